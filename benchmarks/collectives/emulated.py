"""Ranks behind emulated links: the automatic choice beside gloo, and every algorithm's time beside what the model said it would be.

The model is fitted as `hetero-attn tune` fits it, to pings, streams and seven all-reduces (tuning.CALIBRATED), anew for each number of
ranks and delay; the points it is judged by are of other sizes, or of an algorithm that was not among the seven. Raw predictions are judged,
before anything measured corrects them. Calls follow one another back to back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from cpu.verdicts import Verdict
from links import links

from collectives import bars
from collectives.ranks import join, take_turns
from hetero_attn.collectives import tuning
from hetero_attn.collectives.algorithms import NAMES
from hetero_attn.collectives.choice import Fixed, Route
from hetero_attn.collectives.cost import as_settings

RATE_MBIT = 300.0
ROW = 8192                                           # fp32 values
CONFIGURATIONS = ((2, 1.0), (4, 1.0), (8, 1.0), (8, 5.0))            # (ranks, ms one way)
SIZES = (2 << 10, 8 << 10, 32 << 10, 256 << 10, 1 << 20)
FITTING = tuning.Effort(15, 0.5, (), 0.0)            # the samples of the fit, and no checks, which would correct predictions
ROUNDS, CALLS = 5, 3


@dataclass(frozen=True)
class Point:
    """An all-reduce of fp32: seconds on the clock and by the model."""

    ranks: int
    delay_ms: float
    nbytes: int
    algorithm: str
    measured: float
    predicted: float


@dataclass(frozen=True)
class Row:
    """One row of ROW fp32 values: seconds of gloo's all-reduce and of the automatic choice, the route it took, all algorithms' seconds."""

    ranks: int
    delay_ms: float
    gloo: float
    auto: float
    route: str
    algorithms: dict[str, float]


@dataclass(frozen=True)
class Emulated:
    """links: for each configuration the fitted link's numbers, as the profile holds them."""

    rows: list[Row]
    points: list[Point]
    links: dict[str, dict[str, float]]

    def verdicts(self) -> list[Verdict]:
        lines = [bars.at_least(f"a row of {ROW} fp32, {row.ranks} ranks, {row.delay_ms:g} ms: the automatic choice over gloo",
                               row.gloo / row.auto, bars.ROW_TIMES[row.ranks, row.delay_ms])
                 for row in self.rows if (row.ranks, row.delay_ms) in bars.ROW_TIMES]
        return [*lines, bars.predictions((point.measured, point.predicted) for point in self.points)] if self.points else lines


def measure(rounds: int, configurations: Sequence[tuple[int, float]], progress: Callable[[str], None]) -> Emulated:
    """Raises links.RankError and LinksError; ask links.unavailable() first."""
    rows, points, numbers = [], [], {}
    for ranks, delay_ms in configurations:
        progress(f"emulated links, {ranks} ranks, {RATE_MBIT:g} Mbit/s, {delay_ms:g} ms: a row, then {len(NAMES)} algorithms by "
                 f"{len(SIZES)} sizes")
        with links(ranks=ranks, rate_mbit=RATE_MBIT, delay_ms=delay_ms) as network:
            found = network.run(in_rank, (rounds,), timeout_s=400)[0]
        rows.append(Row(ranks, delay_ms, **found["row"]))
        points += [Point(ranks, delay_ms, *point) for point in found["points"]]
        numbers[f"{ranks} ranks, {delay_ms:g} ms"] = found["link"]
    return Emulated(rows, points, numbers)


def in_rank(rounds: int) -> dict:
    """One configuration: {row, points: (bytes, algorithm, measured, predicted), link}."""
    with join("distributed") as communicator:        # algorithm: auto, measured at start-up, as a user has it
        auto = communicator.choice
        x, gloos = torch.zeros(ROW), torch.zeros(ROW)

        def by(choice, x=x) -> Callable[[], object]:
            def call() -> None:
                communicator.choice = choice
                communicator.all_reduce(x)
            return call

        contenders = {"gloo": lambda: dist.all_reduce(gloos), "auto": by(auto)} | {name: by(Fixed(Route(name))) for name in NAMES}
        times = turns(communicator, contenders, 2 * rounds)
        row = {"gloo": times.pop("gloo"), "auto": times.pop("auto"), "algorithms": times,
               "route": "/".join(auto.pick("all_reduce", x.nbytes, x.dtype))}
        fitted = tuning.survey(communicator, tuning.gather_hosts(communicator), FITTING)
        points = []
        for nbytes in SIZES:
            x = torch.zeros(nbytes // 4)
            times = turns(communicator, {name: by(Fixed(Route(name)), x) for name in NAMES}, rounds)
            points += [(nbytes, name, seconds, fitted.predicted("all_reduce", Route(name), nbytes)) for name, seconds in times.items()]
    return {"row": row, "points": points, "link": as_settings(fitted.link)}


def turns(communicator, contenders: dict, rounds: int) -> dict[str, float]:
    """take_turns() between ranks whose clocks' times travel by the quickest way."""
    found = take_turns(communicator, contenders, 0.0, rounds=rounds, calls=CALLS)
    communicator.choice = Fixed(Route("one_shot"))
    return found
