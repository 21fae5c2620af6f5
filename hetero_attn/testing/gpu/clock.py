"""Times on a device: contenders take turns in one run, each turn is timed by the device's own events, and medians are compared.

On a CPU (a rehearsal) the host's clock takes their place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP = 3
FLUSH_BYTES = 256 << 20                              # more than any L2 so far
HELD_CYCLES = 1_000_000                              # about 0.5 ms: longer than the host takes to enqueue a call


def medians(contenders: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 20, *,
            behind: bool = True, flush: bool = False) -> dict[str, float | str]:
    """Name -> median seconds of a call, interleaved; or the first line of its error, where it does not run. behind: as once() has it.
    flush: each call finds the device's caches full of something else, as within a model, where it would find what it left itself."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    other = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if flush and device.type == "cuda" else None
    for turn in range(WARM_UP + rounds):
        for name, run in contenders.items():
            if name in failed:
                continue
            try:
                if other is not None:
                    other.zero_()
                seconds = once(run, device, behind=behind)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]
                continue
            if turn >= WARM_UP:
                times[name].append(seconds)
    return {name: failed[name] if name in failed else statistics.median(times[name]) for name in contenders}


def once(run: Callable[[], object], device: torch.device, *, behind: bool = True) -> float:
    """Seconds of one call. behind: the device waits HELD_CYCLES first, so that all of the call is enqueued when its time begins; without,
    the host's share is in the time, which a decode step of some microseconds would otherwise be made of."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if behind:
            torch.cuda._sleep(HELD_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
