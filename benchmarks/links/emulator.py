"""links(): the network as a context manager. What it makes is made and removed by guard.py, which outlives whatever happens here.

The kernel's own sch_netem carries the delay where it exists (wired.py), a compiled switch between TUN devices otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from links import program, wired
from links.build import switch_library
from links.command import LinksError
from links.namespaces import has_netem, names_of, remove, sweep, temporary_folder, unavailable
from links.settings import INTERFACE, Settings, address

FOLDER = Path(__file__).parent
MOST_RANKS = 64
SETUP_S, ANSWER_S, REMOVAL_S = 60.0, 10.0, 15.0
GUARD = f"import sys; sys.path.insert(0, {str(FOLDER.parent)!r}); from links.guard import main; main()"
_serial = itertools.count(1)


class Network:
    """Ranks in namespaces, each behind its own full-duplex link. Made by links()."""

    def __init__(self, settings: Settings, process: subprocess.Popen) -> None:
        self.settings, self._process = settings, process
        self.via = "switch" if settings.library else "netem"
        self.interface = INTERFACE
        self.addresses = [address(rank) for rank in range(settings.ranks)]
        self._store_ports = itertools.count(29500)       # no two programs meet on one, so that a slow end disturbs nobody
        self._answering = threading.Lock()

    @property
    def ranks(self) -> int:
        return self.settings.ranks

    def environment(self, rank: int, port: int) -> dict[str, str]:
        """What torchrun would set if each rank were a host, and the interface for gloo. port: where rank 0 serves the store."""
        return {
            "RANK": str(rank), "WORLD_SIZE": str(self.ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank),
            "MASTER_ADDR": self.addresses[0], "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": self.interface,
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),       # it warns that these hosts are in no name service
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // self.ranks)),
        }

    def run(
        self,
        fn: Callable[..., Any] | Sequence[str],
        args: Sequence[Any] = (),
        *,
        timeout_s: float = 300.0,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[int, str], None] | None = None,
    ) -> list[Any]:
        """One process per rank, in its namespace and under its own host name (rank0, rank1, ...); returns in rank order.

        fn: a top-level function, called as fn(*args) with RANK and the rest in os.environ: what each returned (pickled). Or a command
        (args follow it): an Ended with output and errors for each. on_line: called with (rank, line) of output as it comes.
        Raises RankError, naming the rank that failed first or was slowest and what it wrote, ValueError, LinksError; no process is left.
        """
        port = next(self._store_ports)
        places = [program.Place(name, self.environment(rank, port) | dict(env or {})) for rank, name in enumerate(self.settings.names)]
        try:
            return program.run(places, fn, args, self.settings.folder, timeout_s=timeout_s, on_line=on_line)
        except program.RankError:
            self._check()
            raise

    def counters(self) -> dict[str, Any]:
        """What passed so far. ports: for each rank packets and IP bytes sent and received, packets dropped for a full queue at its sending
        and at its receiving port; cpu_s: CPU seconds of the switch; at_s: this moment, monotonic. The switch adds the longest wait at a
        receiving port and by how much deliveries were late. Raises LinksError."""
        with self._answering:
            self._check()
            self._process.stdin.write("counters\n")
            return self._read(ANSWER_S, "counters")

    def _check(self) -> None:
        if self._process.poll() is not None:
            raise LinksError(f"the network of {self.ranks} ranks is gone: its guard ended with code {self._process.returncode}")

    def _read(self, patience_s: float, what: str) -> dict[str, Any]:
        if not select.select([self._process.stdout], [], [], patience_s)[0]:
            raise LinksError(f"the network's guard gave no {what} within {patience_s:g} s")
        line = self._process.stdout.readline()
        answer = json.loads(line) if line.startswith("{") else {"said": line.strip()}
        if "error" in answer or not line:
            raise LinksError(answer.get("error") or f"the network's guard ended without a word (code {self._process.wait()})")
        return answer


@contextlib.contextmanager
def links(
    ranks: int, rate_mbit: float = 300.0, delay_ms: float = 1.0, *, mtu: int = 9000, queue_ms: float = 200.0, via: str = "auto"
) -> Iterator[Network]:
    """A network of `ranks` namespaces, each with a full-duplex link of rate_mbit (10^6 bit/s of IP packets, each way) and a one-way delay
    of delay_ms (10^-3 s) between any two.

    mtu: bytes of the largest IP packet. queue_ms: how long a packet may wait for its receiver's port, beyond that it is dropped. via:
    'switch' (TUN, compiled), 'netem' (the kernel alone; without a delay it needs no sch_netem), 'auto' = netem where the kernel has it.
    Raises ValueError, and LinksError where it cannot be: ask unavailable() first. At the end, whatever ends it, all is removed.
    """
    for name, value, fits, wanted in (
        ("ranks", ranks, 1 <= ranks <= MOST_RANKS, f"1 to {MOST_RANKS}"),
        ("rate_mbit", rate_mbit, 0.1 <= rate_mbit <= 1e5, "0.1 to 100000"),
        ("delay_ms", delay_ms, 0 <= delay_ms <= 1e4, "0 to 10000"),
        ("mtu", mtu, 576 <= mtu <= 65000, "576 to 65000"),
        ("queue_ms", queue_ms, 0 < queue_ms <= 1e5, "above 0, to 100000"),
        ("via", via, via in ("auto", "switch", "netem"), "auto, switch or netem"),
    ):
        if not fits:
            raise ValueError(f"links: {name} is {value!r}, expected {wanted}")
    if reason := unavailable():
        raise LinksError(f"no emulated links here: {reason}")
    if via == "netem" and delay_ms and not has_netem():
        raise LinksError(f"via 'netem' with a delay of {delay_ms:g} ms: this kernel has no sch_netem; use via 'switch'")
    wire = via == "netem" or (via == "auto" and has_netem())
    sweep()
    owner = os.getpid()
    library = "" if wire else switch_library()
    settings = Settings(owner, names_of(owner, next(_serial), ranks), temporary_folder(), rate_mbit, delay_ms, mtu, queue_ms, library)
    process = subprocess.Popen([sys.executable, "-c", GUARD, json.dumps(dataclasses.asdict(settings))], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True)
    try:
        network = Network(settings, process)
        network._read(SETUP_S, "sign of being ready")
        yield network
    finally:
        _end(process, settings)


def _end(process: subprocess.Popen, settings: Settings) -> None:
    """The guard sees its pipe close and removes all; should it not, it is done here."""
    try:
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.wait(REMOVAL_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
        remove([*wired.extra(settings.names), *settings.names])
        shutil.rmtree(settings.folder, ignore_errors=True)
