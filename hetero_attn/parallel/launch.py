"""run_ranks(): the ranks of a function on this host, started by torch's elastic launcher, and none of them left behind.

torchrun is a command; a program that wants several ranks of itself uses the same launcher as a library. What is added here is the
manners: the store listens on loopback only, ranks die with their parent, a stopped rank does not hold up the end, signals go back to
whoever handled them before, and a failure is one error that names the first rank to fail.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hetero_attn.collectives import schedule_in_batches
from hetero_attn.collectives.rendezvous import listen_on_loopback
from hetero_attn.parallel.rank_watch import RankWatch

# What the launcher turns into an orderly end. SIGINT is not among them and stays Python's KeyboardInterrupt.
SIGNALS = ("SIGTERM", "SIGHUP", "SIGQUIT")
PR_SET_PDEATHSIG = 1
FOLDER = "hetero-attn-ranks-"                        # + the launching process, + a random end
FIRST = "arguments.0"


class RankFailure(RuntimeError):
    """A rank failed, and all ranks are gone. `.rank` is the first that did, `.reason` the signal or the exception's text.

    `.traceback` is that rank's own, as text; '' for one that a signal ended.
    """

    def __init__(self, rank: int, reason: str, traceback: str = "") -> None:
        super().__init__(f"rank {rank} failed: {reason}")
        self.rank, self.reason, self.traceback = rank, reason, traceback

    def __reduce__(self):
        return type(self), (self.rank, self.reason, self.traceback)


def run_ranks(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    world_size: int = 1,
    *,
    timeout_s: float | None = None,
    threads: int | None = None,
    env: Mapping[str, str] | None = None,
    first_args: Sequence[Any] | None = None,
) -> list[Any]:
    """fn(*args) in `world_size` new processes on this host, under torchrun's environment; their results in rank order.

    fn is a top-level function; it, its arguments and its (small) results are pickled. As with every spawned process, a script that
    calls this needs `if __name__ == "__main__":`. timeout_s: limit for the whole run, None = none. threads: CPU threads of a rank
    (default: cores // ranks, at least 1). env: further environment of the ranks, in place before they import anything. first_args: what
    rank 0 gets in place of args, and no other rank is ever given.
    Signals that would end this process end the ranks first. Raises RankFailure, ValueError for a world_size below 1, TypeError
    for a function that cannot be pickled.
    """
    if world_size < 1:
        raise ValueError(f"run_ranks: world_size is {world_size}, expected at least 1")
    try:
        pickle.dumps(fn)
    except Exception as error:
        raise TypeError(f"run_ranks: fn is {fn!r}, which new processes cannot import; pass a top-level function") from error
    threads = threads or max(1, (os.cpu_count() or 1) // world_size)
    with ExitStack() as stack:
        sweep_abandoned()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{FOLDER}{os.getpid()}-")))
        stack.enter_context(_quiet_launcher())
        stack.enter_context(_environment({"OMP_NUM_THREADS": str(threads), **(env or {})}))
        watch = stack.enter_context(RankWatch(folder, world_size, timeout_s))
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=world_size, max_restarts=0, run_id=uuid.uuid4().hex, start_method="spawn",
            monitor_interval=0.1, rdzv_backend=LoopbackRendezvous.NAME, local_addr="127.0.0.1",
            logs_specs=DefaultLogsSpecs(log_dir=str(folder)), **_signal_option(),
        )
        # The launcher gives every rank the same arguments, and substitutes $-macros in strings: ours travel inside a tuple, and what is
        # rank 0's alone in a file that it deletes as it reads it.
        call = (fn, tuple(args), str(folder), os.getpid(), threads)
        if first_args is not None:
            with open(folder / FIRST, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                pickle.dump(tuple(first_args), file)
        caught = failure = None
        with _signals_restored():
            try:
                results = elastic_launch(config, _run_rank)(call)
                return [pickle.loads(results[rank]) for rank in range(world_size)]
            except SignalException as error:
                caught = error.sigval
            except ChildFailedError as error:
                failure = _first_failure(error, folder, watch)
        if caught is None:
            raise failure from None
    # Everything is gone and the caller's handlers are back: let them have the signal, as if there had been no ranks.
    os.kill(os.getpid(), caught)
    time.sleep(0.1)                                  # a handler written in Python runs here, and may raise
    raise RankFailure(0, f"all ranks ended on {caught.name}")


def _signal_option() -> dict[str, str]:
    """The launcher of older torch has no choice of signals; it takes SIGINT too, which then comes back by way of `caught`."""
    return {"signals_to_handle": ",".join(SIGNALS)} if "signals_to_handle" in LaunchConfig.__dataclass_fields__ else {}


def sweep_abandoned() -> None:
    """Remove the folders of earlier launchers that SIGKILL ended: they are named after their process, which is gone (Linux)."""
    for path in Path(tempfile.gettempdir()).glob(f"{FOLDER}*-*"):
        owner = path.name.removeprefix(FOLDER).partition("-")[0]
        if sys.platform == "linux" and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(path, ignore_errors=True)                    # another user's stays


def _run_rank(call: tuple) -> bytes:
    """In the rank: arrange to die with the parent, then call the function; the result pickled, a failure written down for the parent."""
    fn, args, folder, parent, threads = call
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)     # Ctrl-C reaches the whole terminal: end without a traceback, the parent speaks
    rank = int(os.environ["RANK"])
    (Path(folder) / f"pid.{rank}").write_text(str(os.getpid()))   # for the watch
    torch.set_num_threads(threads)                   # OMP_NUM_THREADS alone may come too late: torch is imported already
    if int(os.environ["WORLD_SIZE"]) > 1:
        schedule_in_batches()
    try:
        own = Path(folder) / FIRST
        if rank == 0 and own.exists():
            content = own.read_bytes()
            own.unlink()
            args = pickle.loads(content)
        return pickle.dumps(fn(*args))               # here, so that a result that cannot be pickled is this rank's failure
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            return pickle.dumps(None)
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        failure = {
            "rank": rank, "time": time.time(), "kind": type(error).__name__, "text": text, "traceback": traceback.format_exc(),
            "missing": getattr(error, "missing", []),
        }
        part = Path(folder) / f"failure.{rank}.part"
        part.write_text(json.dumps(failure))
        part.rename(part.with_suffix(".json"))
    # Not by an exception: torch would pickle it into a temporary file and print a traceback; the parent prints one line.
    raise SystemExit(1)


def die_with(parent: int) -> None:
    """SIGKILL for this process when its parent dies, however it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:                       # it died before we asked
        os._exit(1)


def _first_failure(error: ChildFailedError, folder: Path, watch: RankWatch) -> RankFailure:
    """Of all that went wrong, what went wrong first: later failures are mostly ranks that lost their peer."""
    if watch.timed_out:
        return RankFailure(watch.slowest(), f"the ranks were not done within {watch.timeout_s:g} s")
    rank, failure = error.get_first_failure()
    written = [json.loads(path.read_text()) for path in folder.glob("failure.*.json")]
    if failure.exitcode < 0:                         # a signal; the launcher's own SIGTERMs come after the failure it reports
        return RankFailure(rank, f"ended by {_signal_name(-failure.exitcode)}")
    if written:
        # A rank that leaves on an error closes its connections first, so a peer may write down its loss a moment before.
        first = min(written, key=lambda entry: (entry["kind"] == "CommunicatorError", entry["time"]))
        if first["missing"]:                         # it tells of another: that one is the culprit, and cannot speak for itself
            return RankFailure(first["missing"][0], f"it does not answer; {first['text']}", first["traceback"])
        return RankFailure(first["rank"], first["text"], first["traceback"])
    return RankFailure(rank, f"exited with code {failure.exitcode}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class LoopbackRendezvous(RendezvousHandler):
    """A rendezvous of one agent with itself, whose store listens on 127.0.0.1 alone; torch's own listens everywhere."""

    NAME = "hetero-attn-loopback"

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        listening = listen_on_loopback()
        self._port = listening.getsockname()[1]
        self._store = dist.TCPStore("127.0.0.1", self._port, None, True, wait_for_workers=False, master_listen_fd=listening.detach())

    def get_backend(self) -> str:
        return self.NAME

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(dist.PrefixStore(self._run_id, self._store), 0, 1, RendezvousStoreInfo("127.0.0.1", self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


rendezvous_handler_registry.register(LoopbackRendezvous.NAME, LoopbackRendezvous)


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """os.environ with changes, for the processes started meanwhile. The ranks read some of it before any of our code runs."""
    before = {name: os.environ.get(name) for name in (*changes, "TORCHELASTIC_SIGNALS_TO_HANDLE")}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """The launcher logs each expected failure with a traceback; the one error that run_ranks raises says it."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith(("torch.distributed.", "torch.multiprocessing."))]
    loggers = [logging.getLogger(name) for name in (*names, "torch.multiprocessing.spawn", "torchelastic-events-null")]
    before = [each.disabled for each in loggers]
    for each in loggers:
        each.disabled = True
    try:
        yield
    finally:
        for each, disabled in zip(loggers, before):
            each.disabled = disabled


@contextmanager
def _signals_restored() -> Iterator[None]:
    """The launcher takes over the signals that end a process and keeps them; give them back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in (*SIGNALS, "SIGINT")]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
