"""Timing of contenders side by side: rounds in which each has its turn, so that a machine that drifts drifts for all of them.

A turn begins with a pause, because the threads of whoever came before still spin for a moment, and with one untimed call, which wakes
the contender's own threads and brings its operands where it would find them when called again and again.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager

PAUSE_S = 0.004
SHORT_S = 0.012                     # calls below this are timed several times a turn
CALLS = 3


def once(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def turn(call: Callable[[], object], expected_s: float) -> list[float]:
    """The timings of one turn."""
    time.sleep(PAUSE_S)
    call()
    return [once(call) for _ in range(CALLS if expected_s < SHORT_S else 1)]


def round_robin(
    contenders: Mapping[str, Callable[[], object]], probes: Mapping[str, Callable[[], float]], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each contender's calls, and median of what each probe returned, over `rounds` rounds of one turn each.

    Every other round goes backwards, so that nobody always follows the same neighbour.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    readings: dict[str, list[float]] = {name: [] for name in probes}
    order = list(contenders)
    with collector_off():
        expected = {name: min(once(call), once(call)) for name, call in contenders.items()}
        for number in range(rounds):
            for name in order if number % 2 == 0 else reversed(order):
                times[name] += turn(contenders[name], expected[name])
            for name, probe in probes.items():
                time.sleep(PAUSE_S)
                readings[name].append(probe())
    return ({name: statistics.median(values) for name, values in times.items()},
            {name: statistics.median(values) for name, values in readings.items()})


@contextmanager
def collector_off():
    """No garbage collection inside a timed stretch."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
