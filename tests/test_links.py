"""The emulated links: what they promise is measured, who fails is named, and nothing is left behind, whatever ends their owner.

The switch alone needs no root: it runs here between sockets. The rest needs namespaces and skips with the reason where there are none.
Times are judged by what physics forbids and by generous bounds above; a proof on a busy machine gets three attempts.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = ROOT / "benchmarks" / "links.py"
if str(ROOT / "benchmarks") not in sys.path:
    sys.path.append(str(ROOT / "benchmarks"))

from link_programs import fail_in, reduce_rows, who_am_i  # noqa: E402
from links import LinksError, RankError, links, sweep, unavailable  # noqa: E402
from links.build import compiler_reason, switch_library  # noqa: E402
from links.guard import SWITCH_RUN, Port, Totals  # noqa: E402
from links.namespaces import NAME, present, start_time  # noqa: E402
from links.prove import broken_promises, prove, show, show_counters, stream  # noqa: E402

needs_compiler = pytest.mark.skipif(compiler_reason() is not None, reason=compiler_reason() or "")


@pytest.fixture(scope="module")
def possible():
    if reason := unavailable():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def network(possible):
    with links(ranks=3, rate_mbit=300, delay_ms=2) as made:
        yield made


# -- the switch between sockets

NO_HEADER = struct.pack("<BBHHHH", 0, 0, 0, 0, 0, 0)


def packet(to: int, length: int, mark: int = 0, header: bytes = NO_HEADER) -> bytes:
    """A vnet header and an IPv4 packet to 10.0.0.<to>; its last byte is `mark`. TCP header of 20 bytes, all zero but its length."""
    head = bytes([0x45, 0, *struct.pack("!H", length), 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 99, 10, 0, 0, to])
    return header + head + bytes(12) + b"\x50" + bytes(length - 34) + bytes([mark])


@contextlib.contextmanager
def switch(count: int, ns_per_byte: float, delay_ns: int, queue_ns: int = 10**9):
    """The compiled switch with a socket in place of each TUN device: our ends, the ports' counters."""
    run = ctypes.CDLL(switch_library()).switch_run
    run.argtypes = SWITCH_RUN
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
    ports = (Port * count)()
    for rank, (ours, its) in enumerate(pairs):
        its.setblocking(False)
        ours.settimeout(10)
        ports[rank].fd, ports[rank].address = its.fileno(), int.from_bytes(bytes([10, 0, 0, rank]), sys.byteorder)
    stop, ring = os.pipe()
    totals, codes = Totals(), []
    settings = (ns_per_byte, delay_ns, queue_ns, queue_ns, stop)
    thread = threading.Thread(target=lambda: codes.append(run(ports, count, ctypes.byref(totals), *settings)))
    thread.start()
    try:
        yield [ours for ours, _ in pairs], ports
    finally:
        os.write(ring, b"e")
        thread.join()
        for each in (*pairs[0], *(end for pair in pairs[1:] for end in pair)):
            each.close()
        os.close(stop)
        os.close(ring)
    assert codes == [0]


@needs_compiler
def test_a_packet_takes_its_time_on_the_wire_and_the_delay():
    with switch(2, ns_per_byte=10_000, delay_ns=20_000_000) as (ends, ports):      # 1000 bytes: 10 ms
        began = time.monotonic()
        for mark in range(3):
            ends[0].send(packet(1, 1000, mark))
        got = []
        for _ in range(3):
            got.append((ends[1].recv(70000)[-1], time.monotonic() - began))
        assert [mark for mark, _ in got] == [0, 1, 2]
        for mark, after in got:
            assert 0.030 + 0.010 * mark <= after < 0.030 + 0.010 * mark + 0.5
        assert (ports[0].sent_packets, ports[0].sent_bytes, ports[1].received_packets, ports[1].received_bytes) == (3, 3000, 3, 3000)


@needs_compiler
def test_the_receivers_port_is_booked_when_a_packet_leaves_the_senders():
    with switch(3, ns_per_byte=10_000, delay_ns=5_000_000) as (ends, _):
        began = time.monotonic()
        for mark in range(8):                                # 80 ms at rank 0's own port
            ends[0].send(packet(2, 1000, mark))
        ends[1].send(packet(2, 1000, 100))                   # leaves rank 1's port long before those
        order = [ends[2].recv(70000)[-1] for _ in range(9)]
        assert order.index(100) <= 4, order
        assert [mark for mark in order if mark != 100] == list(range(8))
        assert time.monotonic() - began >= 0.090 + 0.005 - 0.001         # nine packets cannot pass one port faster


@needs_compiler
def test_pieces_are_counted_as_the_packets_they_are_and_time_is_theirs():
    segmented = struct.pack("<BBHHHH", 1, 1, 40, 1000, 20, 16)           # TCP, 1000 bytes of data in each packet
    with switch(2, ns_per_byte=10_000, delay_ns=0) as (ends, ports):
        began = time.monotonic()
        ends[0].send(packet(1, 40 + 4500, 7, segmented))
        whole = ends[1].recv(70000)
        assert whole == packet(1, 40 + 4500, 7, segmented)
        assert (ports[0].sent_packets, ports[0].sent_bytes) == (5, 4500 + 5 * 40)
        assert time.monotonic() - began >= (4500 + 5 * 40) * 10e-6


@needs_compiler
def test_full_queues_drop_and_strangers_are_counted():
    with switch(4, ns_per_byte=10_000, delay_ns=0, queue_ns=25_000_000) as (ends, ports):
        ends[0].send(packet(77, 100))                        # to nobody
        ends[0].send(packet(0, 100))                         # to itself
        ends[0].send(b"short")
        for sender in (1, 2, 3):                             # three times 2 packets of 10 ms to one port that may keep them 25 ms
            for mark in range(2):
                ends[sender].send(packet(0, 1000, mark))
        deadline = time.monotonic() + 10
        while ports[0].received_packets + ports[0].dropped_receiving < 6 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert ports[0].unknown == 3
        assert ports[0].received_packets + ports[0].dropped_receiving == 6
        assert ports[0].dropped_receiving >= 1
        assert ports[0].queued_ns <= 25_000_000
        for mark in range(8):                                # 80 ms of one sender's port
            ends[1].send(packet(2, 1000, mark))
        while ports[2].received_packets + ports[1].dropped_sending < 8 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert ports[1].dropped_sending >= 1 and ports[2].received_packets + ports[1].dropped_sending == 8


# -- the network

def test_the_links_keep_their_promises(network):
    for _ in range(8):
        found = prove(network, seconds=0.5)
        if not broken_promises(found):
            break
    assert broken_promises(found) == [], show(found)
    assert found["ping_ms"]["min"] >= 4.0                    # twice 2 ms, whatever the machine does
    assert "ping round trip" in show(found) and "many to one" in show(found)
    counters = network.counters()
    assert sum(port["sent_packets"] for port in counters["ports"]) > 1000
    assert len(show_counters(counters).splitlines()) == 5


def test_wires_of_the_kernel_alone(possible):
    with links(ranks=2, rate_mbit=200, delay_ms=0, via="netem") as wires:      # without a delay sch_netem is not needed
        for _ in range(8):
            found = prove(wires, seconds=0.4)
            if not broken_promises(found):
                break
        assert broken_promises(found) == [], show(found)
        assert wires.via == "netem" and wires.counters()["ports"][1]["received_packets"] > 100


def test_every_rank_is_a_host_of_its_own(network):
    own_host = socket.gethostname()
    for rank, (prefix, environment, host, interfaces) in enumerate(network.run(who_am_i, ("x",), env={"EXTRA": "1"})):
        assert (prefix, environment) == ("x", [str(rank), "3", "0", "1", network.addresses[0], network.interface, "1"])
        assert host == f"rank{rank}" and set(interfaces) == {"lo", "link0"}
    assert socket.gethostname() == own_host
    ended = network.run(["sh", "-c", 'echo out $RANK "$@"; echo err >&2', "sh"], ["a b", 3])
    assert [(each.rank, each.code, each.output, each.errors) for each in ended] == [(r, 0, f"out {r} a b 3\n", "err\n") for r in range(3)]


SCRIPT = """
import multiprocessing, os, sys
sys.path.insert(0, {benchmarks!r})
from links import links
def mine(x):
    return int(os.environ["RANK"]) + x
if __name__ == "__main__":
    with links(ranks=2) as network:
        print(network.run(mine, (10,)))
    multiprocessing.set_start_method("spawn")
"""


def test_a_scripts_own_function_runs(possible, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(benchmarks=str(ROOT / "benchmarks")))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[10, 11]\n", "")


def test_the_rank_that_failed_is_named(network):
    began = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 failed: ValueError: rank 1 has had enough") as caught:
        network.run(fail_in, ("1",))
    assert caught.value.rank == 1 and "fail_in" in caught.value.output
    with pytest.raises(RankError, match=r"rank 2 failed: exit code 7\nlast words"):
        network.run(["sh", "-c", '[ $RANK != 2 ] || { echo last words >&2; exit 7; }'])
    with pytest.raises(RankError, match=r"rank 0 failed: not done within 0.3 s"):
        network.run(["sh", "-c", '[ $RANK != 0 ] || sleep 60'], timeout_s=0.3)
    with pytest.raises(RankError, match="rank 0 failed: ended by SIGKILL"):
        network.run(["sh", "-c", "[ $RANK != 0 ] || kill -9 $$"])
    assert time.monotonic() - began < 30
    assert not any(pids_in(name) for name in network.settings.names)


def test_a_finite_queue_drops_and_still_fills_the_link(possible):
    with links(ranks=3, rate_mbit=100, delay_ms=1, queue_ms=4) as network:
        begin = time.monotonic() + 1.2
        reports = network.run(stream, ([(1, 0), (2, 0)], network.addresses, begin, 1.0))
        assert network.counters()["ports"][0]["dropped_receiving"] > 0
        assert 40 < sum(reports[0].values()) <= 103


def test_gloo_over_the_links(possible):
    with links(ranks=2, rate_mbit=300, delay_ms=5) as network:
        times = network.run(reduce_rows, (12,), timeout_s=120)
        # Half a row must cross twice, 5 ms each, and 16 KiB take 0.44 ms of the wire; gloo's own hops and a busy machine are on top.
        assert 0.0108 <= statistics.median(times[0]) < 0.3
        assert network.counters()["ports"][0]["sent_bytes"] > 12 * 8192 * 4


# -- nothing stays

OWNER = """
import sys
sys.path.insert(0, {benchmarks!r})
from links import links
with links(ranks=2, rate_mbit=300, delay_ms=1) as network:
    print(network._process.pid, network.settings.folder, flush=True)
    network.run(["sleep", "1000"])
"""


def pids_in(name: str) -> list[int]:
    return [int(pid) for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()]


@pytest.fixture
def owner(possible):
    """A process that has a network in which `sleep` runs: (process, its guard's pid, the sleeping pids, its folder)."""
    process = subprocess.Popen([sys.executable, "-c", OWNER.format(benchmarks=str(ROOT / "benchmarks"))],
                               stdout=subprocess.PIPE, text=True)
    guard, folder = process.stdout.readline().split()
    assert wait_for(lambda: len(sleepers(process.pid)) == 2)
    yield process, int(guard), sleepers(process.pid), Path(folder)
    process.kill()
    process.wait()
    process.stdout.close()
    wait_for(lambda: not names_owned_by(process.pid))


def names_owned_by(pid: int) -> list[str]:
    return [name for name in present() if int(NAME.fullmatch(name)[1]) == pid]


def sleepers(pid: int) -> list[int]:
    """Those that have become `sleep`: a rank is a shell first."""
    found = [each for name in names_owned_by(pid) for each in pids_in(name)]
    return [each for each in found if Path(f"/proc/{each}/comm").read_text() == "sleep\n"]


def wait_for(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_its_owner(owner, number):
    process, guard, pids, folder = owner
    assert folder.is_dir()
    process.send_signal(number)
    assert wait_for(lambda: not names_owned_by(process.pid))
    assert wait_for(lambda: start_time(guard) is None)
    assert all(start_time(pid) is None for pid in pids) and not folder.exists()


def test_a_later_run_sweeps_what_a_killed_owner_and_guard_left(owner, network):
    process, guard, pids, folder = owner
    os.kill(guard, signal.SIGKILL)
    process.kill()
    process.wait()
    assert wait_for(lambda: start_time(guard) is None)
    left = names_owned_by(process.pid)
    assert len(left) == 2
    assert set(left) <= set(sweep())
    assert not names_owned_by(process.pid) and all(start_time(pid) is None for pid in pids) and not folder.exists()
    assert set(network.settings.names) <= set(present())                 # the living are not touched


def test_an_exception_inside_removes_everything(possible):
    with pytest.raises(ZeroDivisionError):
        with links(ranks=2) as network:
            guard, names = network._process.pid, network.settings.names
            assert set(names) <= set(present())
            raise ZeroDivisionError
    assert not set(names) & set(present()) and start_time(guard) is None


# -- asking and the command

@pytest.mark.parametrize("wrong", [{"ranks": 0}, {"rate_mbit": 0}, {"delay_ms": -1}, {"mtu": 100}, {"queue_ms": 0}, {"via": "pigeon"}])
def test_wrong_settings_are_refused(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"links: {name} is {value!r}, expected"):
        with links(**{"ranks": 2} | wrong):
            pass


def test_without_root_there_is_a_reason():
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        assert "not root" in unavailable.__wrapped__()
    finally:
        os.seteuid(before)


def test_a_network_whose_guard_died_says_so(possible):
    with links(ranks=2) as network:
        network._process.kill()
        network._process.wait()
        with pytest.raises(LinksError, match="is gone: its guard ended with code -9"):
            network.counters()
    assert not set(network.settings.names) & set(present())


def test_the_command(possible):
    def ran(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, COMMAND, "--ranks", "2", *words], capture_output=True, text=True, timeout=120)

    done = ran("--json", "--counters", "--", "sh", "-c", "echo $RANK of $WORLD_SIZE on $(cat /proc/sys/kernel/hostname)")
    *lines, last = done.stdout.splitlines()
    assert done.returncode == 0 and sorted(lines) == ["[0] 0 of 2 on rank0", "[1] 1 of 2 on rank1"]
    assert len(json.loads(last)["counters"]["ports"]) == 2 and "dropped" in done.stderr
    failed = ran("--", "sh", "-c", "exit $RANK")
    assert failed.returncode == 1 and "rank 1 failed: exit code 1" in failed.stderr
    refused = ran("--delay", "-1")
    assert refused.returncode == 2 and "delay_ms is -1.0" in refused.stderr
