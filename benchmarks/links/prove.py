"""What the links measure to be, before anything is measured over them: delay, rate, sharing, both directions, and what the switch costs.

Plain ICMP and TCP by the standard library, so that a figure speaks of the links and not of a communication library. Rates are counted where
bytes arrive, after TCP's start, and set against what the link's rate leaves for data: a packet of `mtu` bytes carries mtu - 52.
"""

from __future__ import annotations

import os
import select
import socket
import statistics
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from links.emulator import Network

HEADERS = 52                                             # IPv4 20, TCP 20, its time stamps 12
PORT = 7100
CHUNK = 1 << 18
PINGS, PING_EVERY_S = 30, 5e-3
START_S = 0.4                                            # for interpreters to start and TCP's slow start to end
MOST_SENDERS = 4


def prove(network: Network, seconds: float = 1.0) -> dict[str, Any]:
    """Measure and return, with what the settings promise beside it:

    ping_ms {expected, min, median, max} round trip 0 to 1 (a rank's own loopback where it is alone); and where there are two ranks or
    more, in Mbit/s of TCP payload at the receivers, single (0 to 1), both_ways (0 to 1 and 1 to 0 at once), many_to_one (up to 4 ranks to
    rank 0; three ranks or more) and everyone (each rank to the next, all at once): {expected, total, each: [..], switch_cpu: share of a
    core, dropped: packets}. seconds: length of each. lateness: {mean, most} in us of the switch's deliveries, None without one.
    """
    settings, last = network.settings, network.ranks - 1
    payload = settings.rate_mbit * (settings.mtu - HEADERS) / settings.mtu
    found: dict[str, Any] = {
        "ranks": network.ranks, "rate_mbit": settings.rate_mbit, "delay_ms": settings.delay_ms, "mtu": settings.mtu, "via": network.via,
        "ping_ms": {"expected": 2 * settings.delay_ms} | network.run(ping, (network.addresses[min(1, last)],))[0],
    }
    if last:
        senders = min(MOST_SENDERS, last)
        found["single"] = _stream(network, [(0, 1)], seconds, payload)
        found["both_ways"] = _stream(network, [(0, 1), (1, 0)], seconds, 2 * payload)
        if last > 1:
            found["many_to_one"] = _stream(network, [(rank, 0) for rank in range(1, senders + 1)], seconds, payload)
            found["everyone"] = _stream(network, [(rank, (rank + 1) % network.ranks) for rank in range(network.ranks)], seconds,
                                        payload * network.ranks)
    found["lateness_us"] = network.counters().get("late_us")
    return found


def show(found: dict[str, Any]) -> str:
    """The result of prove() in lines for people."""
    times = found["ping_ms"]
    lines = ["{ranks} ranks, {rate_mbit:g} Mbit/s, {delay_ms:g} ms one way, mtu {mtu}, via {via}".format_map(found),
             "  ping round trip              {median:8.2f} ms      expected {expected:.2f}, min {min:.2f}, max {max:.2f}".format_map(times)]
    for name, words in (("single", "one stream"), ("both_ways", "both directions at once"), ("many_to_one", "many to one"),
                        ("everyone", "everyone to the next")):
        if name in found:
            rates = found[name]
            switch = f"; switch {rates['switch_cpu']:.0%} of a core" if found["via"] == "switch" else ""
            lines.append(f"  {words:<28} {rates['total']:8.1f} Mbit/s  expected {rates['expected']:.1f}; "
                         f"each {', '.join(f'{rate:.0f}' for rate in rates['each'])}{switch}; {rates['dropped']} packets dropped")
    if found["lateness_us"]:
        lines.append(f"  deliveries late by           {found['lateness_us']['mean']:8.1f} us      most {found['lateness_us']['most']:.0f}")
    return "\n".join(lines)


def show_counters(counters: dict[str, Any]) -> str:
    """The result of Network.counters() in lines for people."""
    lines = [f"{'rank':>4} {'sent packets':>13} {'KiB':>10} {'received packets':>17} {'KiB':>10} {'dropped sending':>16} {'receiving':>10}"]
    for rank, port in enumerate(counters["ports"]):
        lines.append(f"{rank:>4} {port['sent_packets']:>13} {port['sent_bytes'] / 1024:>10.1f} {port['received_packets']:>17} "
                     f"{port['received_bytes'] / 1024:>10.1f} {port['dropped_sending']:>16} {port['dropped_receiving']:>10}")
    return "\n".join([*lines, f"switch: {counters['cpu_s']:.2f} s of processor time"])


def ping(target: str) -> dict[str, float]:
    """In every rank; rank 0 asks `target` for ICMP echoes: {min, median, max} of the round trip in ms. The others return {}."""
    if os.environ["RANK"] != "0":
        return {}
    times = []
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as wire:
        for number in range(PINGS):
            started = time.perf_counter()
            wire.sendto(_echo(number), (target, 0))
            while True:
                if not select.select([wire], [], [], 5.0)[0]:
                    raise TimeoutError(f"{target} did not answer within 5 s")
                packet = wire.recv(2048)
                kind, identity, answered = packet[20], *struct.unpack("!HH", packet[24:28])
                if (kind, identity, answered) == (0, os.getpid() & 0xFFFF, number):
                    break
            times.append(1e3 * (time.perf_counter() - started))
            time.sleep(PING_EVERY_S)
    return {"min": min(times), "median": statistics.median(times), "max": max(times)}


def _echo(number: int) -> bytes:
    """An ICMP echo request with its checksum."""
    words = (0x0800, 0, os.getpid() & 0xFFFF, number)
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!4H", words[0], ~total & 0xFFFF, *words[2:])


def _stream(network: Network, flows: Sequence[tuple[int, int]], seconds: float, expected: float) -> dict[str, Any]:
    """Run stream() in all ranks. Clocks are one on this host: all begin to count together, and so does the switch's processor time."""
    begin = time.monotonic() + START_S * (1 + network.ranks / (os.cpu_count() or 1))
    with ThreadPoolExecutor(1) as pool:
        counting = pool.submit(_counters, network, begin, seconds)
        reports = network.run(stream, (list(flows), network.addresses, begin, seconds))
        before, after = counting.result()
    each = [reports[to][str(start)] for start, to in flows]
    return {
        "expected": round(expected, 1), "total": round(sum(each), 1), "each": [round(rate, 1) for rate in each],
        "switch_cpu": round((after["cpu_s"] - before["cpu_s"]) / (after["at_s"] - before["at_s"]), 3),
        "dropped": sum(_dropped(port) for port in after["ports"]) - sum(_dropped(port) for port in before["ports"]),
    }


def _counters(network: Network, begin: float, seconds: float) -> list[dict[str, Any]]:
    """The network's counters at the beginning and at the end."""
    found = []
    for moment in (begin, begin + seconds):
        time.sleep(max(0.0, moment - time.monotonic()))
        found.append(network.counters())
    return found


def _dropped(port: dict[str, int]) -> int:
    return port["dropped_sending"] + port["dropped_receiving"]


def stream(flows: Sequence[tuple[int, int]], addresses: Sequence[str], begin: float, seconds: float) -> dict[str, float]:
    """In every rank: send along the flows (from, to) of this rank until `begin` (monotonic) + `seconds`: {sender: Mbit/s since begin}."""
    rank = int(os.environ["RANK"])
    sources, targets = [start for start, to in flows if to == rank], [to for start, to in flows if start == rank]
    received: dict[str, float] = {}
    with socket.create_server((addresses[rank], PORT)) as server:
        threads = [threading.Thread(target=_send, args=(rank, addresses[to], begin + seconds)) for to in targets]
        for thread in threads:
            thread.start()
        connections = [server.accept()[0] for _ in sources]
        begin = max(begin, time.monotonic())             # one clock for all that share this rank's port
        threads += [threading.Thread(target=_receive, args=(connection, begin, seconds, received)) for connection in connections]
        for thread in threads[len(targets):]:
            thread.start()
        for thread in threads:
            thread.join()
    return received


def _send(rank: int, target: str, until: float) -> None:
    with _connected(target) as connection:
        connection.sendall(struct.pack("!i", rank))
        chunk = bytes(CHUNK)
        try:
            while time.monotonic() < until + START_S:    # the receivers end it
                connection.sendall(chunk)
        except OSError:
            pass


def _connected(target: str) -> socket.socket:
    """A connection to a rank that may not listen yet."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection((target, PORT), timeout=30)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _receive(connection: socket.socket, begin: float, seconds: float, received: dict[str, float]) -> None:
    """Mbit/s of one sender from `begin` for `seconds`."""
    buffer = bytearray(1 << 20)
    with connection:
        connection.settimeout(30)
        sender, total = str(struct.unpack("!i", connection.recv(4, socket.MSG_WAITALL))[0]), 0
        while count := connection.recv_into(buffer):
            now = time.monotonic()
            if now >= begin + seconds:
                break
            if now >= begin:
                total += count
        received[sender] = 8e-6 * total / seconds


def broken_promises(found: dict[str, Any]) -> list[str]:
    """What of prove()'s result is not as promised, in sentences; [] = the links can be measured over.

    The round trip's median within 0.5 ms and 10 % above twice the delay and never below it; rates within -10 % and +3 %."""
    times, broken = found["ping_ms"], []
    if not times["expected"] <= times["median"] <= 1.1 * times["expected"] + 0.5 or times["min"] < 0.99 * times["expected"]:
        broken.append(f"round trip {times['median']:.2f} ms (at least {times['min']:.2f}), expected {times['expected']:.2f}")
    for name in ("single", "both_ways", "many_to_one", "everyone"):
        rates = found.get(name)
        if rates and not 0.9 * rates["expected"] <= rates["total"] <= 1.03 * rates["expected"]:
            broken.append(f"{name} {rates['total']:.1f} Mbit/s, expected {rates['expected']:.1f}")
    return broken
