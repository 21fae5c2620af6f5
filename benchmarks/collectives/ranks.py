"""What all measured ranks do alike: join, take turns, and agree on the slowest rank's time.

Contenders take turns in every round, so that a machine that drifts drifts for all of them. A turn is one untimed call and then a stretch of
calls back to back, as layers of a decoder follow one another; the stretch's mean counts, the median over rounds is told, and of the ranks
the slowest. Ranks run under SCHED_BATCH (init_communicator sees to it), gloo's too.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from hetero_attn.collectives import init_communicator
from hetero_attn.communicator import Communicator
from hetero_attn.profile import load_profile

STRETCH_S = 0.02                                     # of one turn: long enough for the clock, short enough for many rounds
MOST_CALLS = 400


def join(communicator: str, **settings: object) -> Communicator:
    """The communicator of that name for profile cpu with `settings`, one thread a rank."""
    torch.set_num_threads(1)
    return init_communicator(dataclasses.replace(load_profile("cpu"), communicators=(communicator,), **settings))


def take_turns(
    communicator: Communicator, contenders: Mapping[str, Callable[[], object]], seconds: float, *, rounds: int | None = None,
    calls: int | None = None,
) -> dict[str, float]:
    """Name -> seconds of a call. Rounds until `seconds` are over (rank 0 decides), 3 at least, or so many as given; all ranks together.

    calls: of a turn; None: as many as fill STRETCH_S.
    """
    each = {name: slowest(communicator, timed(call, 2)) for name, call in contenders.items()}
    counts = {name: calls or max(1, min(MOST_CALLS, int(STRETCH_S / seconds_))) for name, seconds_ in each.items()}
    spent = sum(counts[name] * each[name] for name in contenders)
    rounds = rounds or max(3, int(seconds / max(spent, 1e-4)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(int(slowest(communicator, rounds))):
        for name in contenders if number % 2 == 0 else reversed(contenders):
            contenders[name]()
            times[name].append(timed(contenders[name], counts[name]))
    return {name: slowest(communicator, statistics.median(values)) for name, values in times.items()}


def timed(call: Callable[[], object], count: int) -> float:
    """Mean seconds of `count` calls back to back."""
    began = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count


def slowest(communicator: Communicator, value: float) -> float:
    """The largest of all ranks' values, the same on each."""
    return communicator.all_gather(torch.tensor([value], dtype=torch.float64), sizes=[1] * communicator.world_size).max().item()
