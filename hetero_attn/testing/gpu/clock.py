"""Times on a device: contenders take turns in one run, each turn is timed by the device's own events, and medians are compared.

On a CPU (a rehearsal) the host's clock takes their place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP = 3


def medians(contenders: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 20) -> dict[str, float | str]:
    """Name -> median seconds of a call, interleaved; or the first line of its error, where it does not run."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    for turn in range(WARM_UP + rounds):
        for name, run in contenders.items():
            if name in failed:
                continue
            try:
                seconds = once(run, device)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]
                continue
            if turn >= WARM_UP:
                times[name].append(seconds)
    return {name: failed[name] if name in failed else statistics.median(times[name]) for name in contenders}


def once(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
