"""The process beside an emulated network: it makes the namespaces, carries the packets, and removes everything when its owner is gone.

The owner holds a pipe into it. Whatever ends the owner, SIGKILL included, closes the pipe; then the guard ends the processes in the
namespaces and deletes those. It runs the switch in its main thread, above other processes where the system allows: a link does not slow
down because its hosts are busy. Standard library only, so that it is there in a moment.
emulator.py starts it with Settings as JSON: `ready` or an error comes back as one line, then a line of counters for each line read.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import struct
import sys
import threading
import time
import traceback
from pathlib import Path

from links import wired
from links.command import LinksError, command
from links.namespaces import FOLDER, remove, start_time
from links.settings import INTERFACE, NETWORK, Settings, address

CLONE_NEWNET = 0x40000000
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
CHECKSUM, SEGMENT = 0x01, 0x02                           # TUN_F_CSUM, TUN_F_TSO4: the switch takes unfinished checksums and long pieces


class Port(ctypes.Structure):
    """switch.cpp Port: a rank's file descriptor, address and counters."""

    _fields_ = [("fd", ctypes.c_int32), ("address", ctypes.c_uint32)] + [(name, ctypes.c_int64) for name in (
        "sent_packets", "sent_bytes", "received_packets", "received_bytes", "dropped_sending", "dropped_receiving", "unknown", "queued_ns")]


class Totals(ctypes.Structure):
    """switch.cpp Totals."""

    _fields_ = [(name, ctypes.c_int64) for name in ("pieces", "late_ns", "latest_ns", "wakes")]


SWITCH_RUN = [ctypes.POINTER(Port), ctypes.c_int, ctypes.POINTER(Totals), ctypes.c_double, *[ctypes.c_int64] * 3, ctypes.c_int]


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    stop, ring = os.pipe()
    for end in (stop, ring):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)       # Python's own handlers wait until the switch returns; this does not
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        ports = _switched(settings) if settings.library else _wired(settings)
        totals = Totals()
        counters = (lambda: _switch_counters(ports, totals)) if settings.library else (lambda: wired.counters(settings.names, INTERFACE))
        threading.Thread(target=_answer, args=(settings, counters, ring), daemon=True).start()
        print("ready", flush=True)
        if settings.library:
            _run_switch(settings, ports, totals, stop)
        else:
            select.select([stop], [], [])
    except LinksError as error:
        _say(error=str(error))
    except Exception:
        _say(error=traceback.format_exc())
    finally:
        remove(wired.extra(settings.names) + settings.names)
        shutil.rmtree(settings.folder, ignore_errors=True)


def _say(**what) -> None:
    try:
        print(json.dumps(what), flush=True)
    except OSError:                                             # the owner is gone
        pass


def _answer(settings: Settings, counters, ring: int) -> None:
    """Counters for every line read, until the owner closes its end or, should a child of it still hold that, is gone."""
    started = start_time(settings.owner)
    try:
        while True:
            if not select.select([0], [], [], 1.0)[0]:
                if started is None or start_time(settings.owner) != started:
                    break
                continue
            asked = os.read(0, 4096)
            if not asked:
                break
            for _ in range(asked.count(b"\n")):
                try:
                    _say(**counters(), cpu_s=time.process_time(), at_s=time.monotonic())
                except LinksError as error:
                    _say(error=str(error))
    finally:
        os.write(ring, b"e")


# -- the switch

def _switched(settings: Settings) -> ctypes.Array:
    """Namespaces, each with a TUN device that ends here. The device's queue shapes what TCP sees: a sender that is asked to wait."""
    ports = (Port * settings.ranks)()
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    for rank, name in enumerate(settings.names):
        command("ip", "netns", "add", name)
        ports[rank].fd = _open_tun(name, home)
        ports[rank].address = int.from_bytes(bytes(map(int, address(rank).split("."))), sys.byteorder)
        configure(name, rank, settings, settings.burst_bytes)
    os.close(home)
    return ports


def configure(name: str, rank: int, settings: Settings, burst: int) -> None:
    """Address, MTU and the sending port's rate (tc tbf) of a rank's interface, which is there."""
    command("ip", "-n", name, "-batch", "-", text=f"""\
link set lo up
link set {INTERFACE} mtu {settings.mtu} gso_max_size {min(settings.piece_bytes, burst)} up
addr add {address(rank)}/16 dev {INTERFACE}
{_route(rank)}
""")
    command("ip", "netns", "exec", name, "tc", *wired.rate(INTERFACE, settings.bits_per_s, burst, settings.queue_bytes(0.2)))
    command("ip", "netns", "exec", name, "sh", "-c", """\
for f in all default; do [ ! -e /proc/sys/net/ipv6/conf/$f/disable_ipv6 ] || echo 1 > /proc/sys/net/ipv6/conf/$f/disable_ipv6; done""")


def _route(rank: int) -> str:
    """ip's words for TCP's usual congestion control, where this machine prefers another: bbr paces by what it believes the link to be.

    By route, for a namespace may not choose it for all its connections unless the host does."""
    try:
        known = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    except OSError:
        known = []
    return f"route replace {NETWORK} dev {INTERFACE} proto kernel scope link src {address(rank)} congctl cubic" if "cubic" in known else ""


def _open_tun(name: str, home: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(namespace: int) -> None:
        if libc.setns(namespace, CLONE_NEWNET):
            raise LinksError(f"setns into {name}: {os.strerror(ctypes.get_errno())}")

    there = os.open(FOLDER / name, os.O_RDONLY)
    enter(there)
    try:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(tun, TUNSETOFFLOAD, CHECKSUM | SEGMENT)
    except OSError as error:
        raise LinksError(f"a TUN device in {name}: {error}") from None
    finally:
        enter(home)
        os.close(there)
    return tun


def _run_switch(settings: Settings, ports: ctypes.Array, totals: Totals, stop: int) -> None:
    run = ctypes.CDLL(settings.library).switch_run
    run.argtypes = SWITCH_RUN
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    except OSError:
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    ns_per_byte = 8e9 / settings.bits_per_s
    sending_ns = max(settings.queue_ms * 1e6, 2 * settings.burst_bytes * ns_per_byte)      # what tc lets through at once must fit
    ended = run(ports, settings.ranks, ctypes.byref(totals), ns_per_byte, round(settings.delay_ms * 1e6), round(sending_ns),
                round(settings.queue_ms * 1e6), stop)
    if ended:
        raise LinksError(f"the switch ended: {os.strerror(ended)}")


def _switch_counters(ports: ctypes.Array, totals: Totals) -> dict:
    counts = [name for name, _ in Port._fields_ if name not in ("fd", "address", "queued_ns")]
    pieces = max(1, totals.pieces)
    return {
        "ports": [{name: getattr(port, name) for name in counts} | {"longest_queue_ms": port.queued_ns / 1e6} for port in ports],
        "deliveries": totals.pieces, "wakes": totals.wakes,
        "late_us": {"mean": round(totals.late_ns / pieces / 1e3, 1), "most": round(totals.latest_ns / 1e3, 1)},
    }


# -- or wires

def _wired(settings: Settings) -> None:
    for name in [*wired.extra(settings.names), *settings.names]:
        command("ip", "netns", "add", name)
    wired.join(settings.names, INTERFACE)
    for rank, name in enumerate(settings.names):
        configure(name, rank, settings, burst=2 * settings.mtu + 100)
        wired.receiving_port(settings.names, rank, settings)

