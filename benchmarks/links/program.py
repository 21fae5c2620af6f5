"""One process per rank, each in its namespace: started together, ended together, and a failure names the rank that failed first.

Each has a host name of its own besides its network, for programs tell hosts apart by it; memory and files are shared all the same. A rank
that fails leaves the others waiting for it, so they get a moment to say so and are ended. Nothing polls: the ranks need the processors.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import spawn
from pathlib import Path
from typing import Any, NamedTuple

GRACE_S = 1.0                                            # for the others, once a rank has failed
LAST_LINES = 20
ENTER = 'echo "$0" > /proc/sys/kernel/hostname; exec "$@"'
RANK = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); from links.program import in_rank; in_rank(*sys.argv[1:])"


class Place(NamedTuple):
    """Where a rank runs: its namespace, and what its environment has beyond ours."""

    namespace: str
    environment: Mapping[str, str]


class Ended(NamedTuple):
    """How a rank's command ended: exit code (negative: the signal), and what it wrote."""

    rank: int
    code: int
    output: str
    errors: str


class RankError(RuntimeError):
    """A rank failed, and all are gone. rank: the first that did; reason: in a line; output: the last it wrote, or its traceback."""

    def __init__(self, rank: int, reason: str, output: str = "") -> None:
        super().__init__(f"rank {rank} failed: {reason}" + (f"\n{output}" if output else ""))
        self.rank, self.reason, self.output = rank, reason, output


def run(
    places: Sequence[Place], fn: Callable[..., Any] | Sequence[str], args: Sequence[Any], folder: str, *, timeout_s: float,
    on_line: Callable[[int, str], None] | None = None,
) -> list[Any]:
    """See emulator.Network.run. folder: where the call and its results may lie meanwhile."""
    if not callable(fn):
        words = [fn] if isinstance(fn, str) else list(fn)
        if not words:
            raise ValueError("run: the command is empty, expected a function or a program and its arguments")
        return _processes(places, [[*map(str, words), *map(str, args)]] * len(places), timeout_s, on_line)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        call = Path(own) / "call"
        call.write_bytes(_pickled(fn, args))
        answers = [Path(own) / str(rank) for rank in range(len(places))]
        words = [[sys.executable, "-c", RANK, str(call), str(answer)] for answer in answers]
        try:
            _processes(places, words, timeout_s, on_line)
        except RankError as error:
            if answers[error.rank].exists():
                reason, text = pickle.loads(answers[error.rank].read_bytes())
                raise RankError(error.rank, reason, text) from None
            raise
        return [pickle.loads(answer.read_bytes()) for answer in answers]


def _pickled(fn: Callable[..., Any], args: Sequence[Any]) -> bytes:
    """What a new interpreter needs to make this call: our module search path, our script if the function is in it, function, arguments."""
    try:
        call = pickle.dumps((fn, tuple(args)))
    except Exception as error:
        raise TypeError(f"run: {fn!r} and its arguments cannot be pickled ({error}); pass a top-level function and plain values") from None
    # What multiprocessing's spawn tells a new process; asking it for this would settle the caller's own start method.
    scene = {"sys_path": list(sys.path), "sys_argv": list(sys.argv), "dir": os.getcwd(), "orig_dir": os.getcwd()}
    main = sys.modules["__main__"]
    if b"__main__" in call:                              # importing our script is dear, and only needed for what it defines
        if getattr(main, "__spec__", None) is not None:
            scene["init_main_from_name"] = main.__spec__.name
        elif getattr(main, "__file__", None):
            scene["init_main_from_path"] = os.path.abspath(main.__file__)
    return pickle.dumps((scene, call))


def in_rank(call: str, answer: str) -> None:
    """In the rank's process: make the call in the file `call`, write its result, or a failure's line and traceback, to `answer`."""
    made, failed = None, False
    try:
        scene, pickled = pickle.loads(Path(call).read_bytes())
        spawn.prepare(scene)
        fn, args = pickle.loads(pickled)
        made = pickle.dumps(fn(*args))
    except Exception as error:
        failed = True
        made = pickle.dumps((f"{type(error).__name__}: {error}", traceback.format_exc()))
    part = Path(f"{answer}.part")
    part.write_bytes(made)
    part.rename(answer)
    sys.exit(1 if failed else 0)


def _processes(places: Sequence[Place], words: Sequence[Sequence[str]], timeout_s: float, on_line) -> list[Ended]:
    own_host = ["unshare", "--uts", "sh", "-c", ENTER] if shutil.which("unshare") else ["sh", "-c", 'exec "$@"']
    started: list[subprocess.Popen] = []
    try:
        for rank, (place, command) in enumerate(zip(places, words)):
            started.append(subprocess.Popen(
                ["ip", "netns", "exec", place.namespace, *own_host, f"rank{rank}", *command], env={**os.environ, **place.environment},
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True))
        return _Watch(started, on_line).wait(timeout_s)
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in started:
            process.wait()
            process.stdout.close()
            process.stderr.close()


class _Watch:
    """Reads what the ranks write until all have ended, one has failed, or time is up."""

    def __init__(self, started: Sequence[subprocess.Popen], on_line: Callable[[int, str], None] | None) -> None:
        self._started, self._on_line = started, on_line
        self._written = {(rank, name): b"" for rank in range(len(started)) for name in ("stdout", "stderr")}
        self._shown = dict.fromkeys(self._written, 0)

    def wait(self, timeout_s: float) -> list[Ended]:
        deadline, failed, running = time.monotonic() + timeout_s, None, set(range(len(self._started)))
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as descriptors:
            for rank, process in enumerate(self._started):
                ended = os.pidfd_open(process.pid)
                descriptors.callback(os.close, ended)
                selector.register(ended, selectors.EVENT_READ, (rank, None))
                for name in ("stdout", "stderr"):
                    os.set_blocking(getattr(process, name).fileno(), False)
                    selector.register(getattr(process, name), selectors.EVENT_READ, (rank, name))
            while running:
                for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                    rank, name = key.data
                    if name is not None:
                        if not self._read(rank, name):
                            selector.unregister(key.fileobj)
                        continue
                    selector.unregister(key.fileobj)
                    running.discard(rank)
                    if self._started[rank].wait() and failed is None:
                        failed, deadline = rank, min(deadline, time.monotonic() + GRACE_S)
                if running and time.monotonic() >= deadline:
                    break
        for rank, name in self._written:                 # what a rank wrote last; a child of it may hold the pipe open for ever
            self._read(rank, name)
            self._show(rank, name, everything=True)
        if failed is not None:
            raise RankError(failed, _end_of(self._started[failed].returncode), self._last(failed))
        if running:
            rest = ", ".join(map(str, sorted(running)))
            raise RankError(min(running), f"not done within {timeout_s:g} s (nor were others, still running: {rest})" if len(running) > 1
                            else f"not done within {timeout_s:g} s", self._last(min(running)))
        return [Ended(rank, process.returncode, self._text(rank, "stdout"), self._text(rank, "stderr"))
                for rank, process in enumerate(self._started)]

    def _read(self, rank: int, name: str) -> bool:
        """Take what is there; False: there will be no more."""
        pipe = getattr(self._started[rank], name)
        with contextlib.suppress(BlockingIOError):
            while True:
                some = os.read(pipe.fileno(), 1 << 16)
                if not some:
                    return False
                self._written[rank, name] += some
                self._show(rank, name)
        return True

    def _show(self, rank: int, name: str, everything: bool = False) -> None:
        if self._on_line is None:
            return
        written = self._written[rank, name]
        until = len(written) if everything else written.rfind(b"\n") + 1
        if until > self._shown[rank, name]:
            for line in written[self._shown[rank, name]:until].decode(errors="replace").splitlines():
                self._on_line(rank, line)
            self._shown[rank, name] = until

    def _text(self, rank: int, name: str) -> str:
        return self._written[rank, name].decode(errors="replace")

    def _last(self, rank: int) -> str:
        return "\n".join((self._text(rank, "stdout") + self._text(rank, "stderr")).strip().splitlines()[-LAST_LINES:])


def _end_of(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"
