"""Nobody is left behind: ends the ranks that outstay a failure, an orderly end, or the time limit.

The elastic launcher stops the others with SIGTERM when one rank fails, and looks again after 30 s; a rank under SIGSTOP would live as
long. Each rank writes its pid into a folder; pidfds (Linux) make sure that a signal reaches that process and no later one of its number.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from pathlib import Path

GRACE_S = 2.0                                        # from the first rank's failure to the SIGKILL of those still there
FAREWELL_S = 30.0                                    # the same after a first rank that ended well: interpreters may take long to exit


class RankWatch:
    """A thread that waits for the ranks' ends, and kills what is left some time after the first, or at the time limit.

    folder: pid.<rank> appears in it when a rank starts, failure.<rank>.json when it fails. timeout_s: limit for the whole run, None = none.
    Elsewhere than on Linux it does nothing, and the launcher's own 30 s stand.
    """

    def __init__(self, folder: Path, world_size: int, timeout_s: float | None) -> None:
        self.folder, self.world_size, self.timeout_s = folder, world_size, timeout_s
        self.timed_out = False
        self._fds: dict[int, int] = {}
        self._ended: set[int] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hetero-attn-rank-watch", daemon=True)

    def __enter__(self) -> RankWatch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        for fd in self._fds.values():
            os.close(fd)

    def slowest(self) -> int:
        """A rank that had not ended when the time was up."""
        return min(set(range(self.world_size)) - self._ended, default=0)

    def _watch(self) -> None:
        if not hasattr(os, "pidfd_open"):
            return
        began, deadline = time.monotonic(), None
        while not self._over.wait(0.1):
            self._look()
            now = time.monotonic()
            if self._ended and deadline is None:
                deadline = now + (FAREWELL_S if all(map(self._went_well, self._ended)) else GRACE_S)
            if self.timeout_s is not None and now - began > self.timeout_s and not self._ended:
                self.timed_out = True
            if self.timed_out or (deadline is not None and now > deadline):
                self._kill()                         # again and again: a rank that is still starting has not told its pid

    def _went_well(self, rank: int) -> bool:
        """Whether an ended rank's exit status is 0, read without taking it from the launcher, who waits for it too."""
        try:
            status = os.waitid(os.P_PIDFD, self._fds[rank], os.WEXITED | os.WNOWAIT | os.WNOHANG)
        except (KeyError, ChildProcessError):        # reaped already: a rank that failed at once, or the very end
            return not any(self.folder.glob("failure.*.json"))
        return status is None or status.si_status == 0

    def _look(self) -> None:
        for rank in set(range(self.world_size)) - set(self._fds) - self._ended:
            path = self.folder / f"pid.{rank}"
            text = path.read_text() if path.exists() else ""
            if text:
                try:
                    self._fds[rank] = os.pidfd_open(int(text))
                except ProcessLookupError:
                    self._ended.add(rank)
        self._ended |= {rank for rank, fd in self._fds.items() if _readable(fd)}

    def _kill(self) -> None:
        for rank, fd in self._fds.items():
            if rank not in self._ended:
                try:
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                except ProcessLookupError:
                    pass


def _readable(fd: int) -> bool:
    poll = select.poll()                             # select() itself ends at descriptor 1023
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
