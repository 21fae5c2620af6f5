"""What the codecs cost a model, by benchmarks/codec_accuracy.py: held-out text through real TP=4 and TP=8, and a stress with outliers.

Half an hour of small steps on two cores: they are kept in a folder as they are done, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import codec_accuracy
from cpu.verdicts import Verdict

from collectives import bars

WINDOWS, DRAWS, RANKS = 48, 20, (4, 8)
STRESS_TIMES = 5.0


@dataclass(frozen=True)
class Accuracy:
    """runs: one a number of ranks, as codec_accuracy.measure() gives it; stress: variant -> root mean square error."""

    runs: list[dict]
    stress: dict[str, float]

    def verdicts(self) -> list[Verdict]:
        lines = []
        for run in self.runs:
            kept = {row["variant"]: row["kept_of_bf16"] for row in run["rows"]}
            figures = ", ".join(f"{words} {kept[variant]:.2%}" for words, variant in (
                ("selected keeps", "selected 1/64 kept"), ("all-INT4", "all INT4"), ("random", "random 1/64 kept")))
            lines += [bars.holds(f"TP={run['tp']}: {claim}", bool(met), figures) for claim, met in run["verdicts"].items()]
        times = self.stress["all INT4"] / self.stress["selected 1/64 kept"]
        return [*lines, bars.at_least("stress: RMSE(all-INT4) over RMSE(selected)", times, STRESS_TIMES)]


def measure(windows: int, draws: int, cache: Path, progress: Callable[[str], None]) -> Accuracy:
    """Raises RuntimeError with a rank's traceback where one fails."""
    runs = [codec_accuracy.measure(ranks, windows, draws, cache, math.inf, progress) for ranks in RANKS]
    progress("accuracy: stress with outliers")
    return Accuracy(runs, codec_accuracy.stress())
