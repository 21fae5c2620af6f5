"""Whether communication runs beside this process's computing: who computes for long asks to be told, and lets other threads in meanwhile.

A thread that a message wakes gets the processor when the scheduler takes it from the kernel that has it, at its next tick: up to 4 ms at
250 Hz, and each hop of a sum pays it once or twice where every core computes (72 rows of 2048 fp32 between 2 ranks at 300 Mbit/s: 17 ms
alone, 24 beside a product). Priorities do not mend it: a woken thread that preempts gloo's caller spins on the lock that this one holds.
A kernel that offers the processor every millisecond does, and needs no privilege.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

_lock = threading.Lock()
_watchers: list[Callable[[bool], object]] = []
_calls = 0


def watch(tell: Callable[[bool], object]) -> None:
    """tell(True) from now on when communication begins beside the caller, tell(False) when the last of it is done; now, if it runs."""
    with _lock:
        _watchers.append(tell)
        if _calls:
            tell(True)


def begin() -> None:
    """An operation has been handed to a thread that communicates."""
    _count(1)


def end() -> None:
    """It is done, or has failed."""
    _count(-1)


def _count(change: int) -> None:
    global _calls
    with _lock:
        before, _calls = _calls, _calls + change
        if (before > 0) != (_calls > 0):
            for tell in _watchers:
                tell(_calls > 0)
