"""The table of attention: six shapes in three dtypes, ours beside torch SDPA, FlexAttention and ONNX Runtime, and beside the limit.

Every cell is one round-robin of its contenders and of its two limits, so all that a ratio compares was measured within the same
seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cpu import verdicts
from cpu.limits import GemmProbe, ReadProbe
from cpu.peers import LABELS, contenders, operands
from cpu.shapes import DTYPES, SHAPES, Limits, figure
from cpu.timing import round_robin
from cpu.verdicts import Verdict


@dataclass
class Cell:
    """One shape in one dtype: median seconds by contender (ours, sdpa, flex, ort), reasons of those not timed, limits of those rounds."""

    name: str
    dtype: str
    seconds: dict[str, float]
    reasons: dict[str, str]
    notes: dict[str, str]
    limits: Limits

    @property
    def limit_s(self) -> float:
        return self.limits.attention_s(SHAPES[self.name], self.dtype)

    def speedup(self, who: str = "ours") -> float | None:
        """Over torch SDPA; None if either was not timed."""
        if who not in self.seconds or "sdpa" not in self.seconds:
            return None
        return self.seconds["sdpa"] / self.seconds[who]

    @property
    def peers(self) -> dict[str, float]:
        """Speed-up over torch SDPA of the other peers that were timed."""
        return {LABELS[who]: self.speedup(who) for who in ("flex", "ort") if self.speedup(who) is not None}

    @property
    def best_peer(self) -> float:
        return max([1.0, *self.peers.values()])

    def verdicts(self) -> list[Verdict]:
        """The required lines of this cell; a cell without a time of ours, or of torch SDPA, fails with the reason."""
        if self.speedup() is None:
            reason = "; ".join(f"{LABELS[who]}: {why}" for who, why in self.reasons.items()) or "not timed"
            return [Verdict(f"{self.name} {self.dtype}", False, reason)]
        shape, ours = SHAPES[self.name], self.seconds["ours"]
        lines = [verdicts.over_figures(self.name, self.dtype, self.speedup(), self.seconds["sdpa"] / self.limit_s),
                 verdicts.over_peers(self.name, self.dtype, self.speedup(), self.peers)]
        if shape.decode:
            lines.append(verdicts.decode(self.name, self.dtype, shape, ours, self.limit_s))
        else:
            lines.append(verdicts.prefill(self.name, self.dtype, shape, ours, self.limits.gemm))
        return [line for line in lines if line is not None]


def measure(backend: str, rounds: int, progress: Callable[[str], None]) -> list[Cell]:
    """All cells, shape by shape. Takes a few minutes, most of them FlexAttention's compilation the first time."""
    gemm, cells = GemmProbe(), []
    for name, shape in SHAPES.items():
        for dtype in DTYPES:
            progress(f"attention {name} ({shape}) {dtype}")
            given = operands(shape, getattr(torch, dtype))
            read = ReadProbe(tensors=given[1:])                                     # where the contenders read, from L3 if K and V fit it
            with torch.inference_mode():
                made = contenders(shape, getattr(torch, dtype), backend, given=given)
                timed = {one.name: one.call for one in made if one.reason is None}
                seconds, readings = round_robin(timed, {"gemm": gemm, "read": read}, rounds)
            cells.append(Cell(
                name, dtype, seconds,
                reasons={one.name: one.reason for one in made if one.reason is not None},
                notes={one.name: one.note for one in made if one.note},
                limits=Limits(readings["gemm"], readings["read"]),
            ))
    return cells


def means(cells: list[Cell]) -> list[Verdict]:
    """The geometric mean over all cells, against the table's best peers and against this run's."""
    timed = [cell for cell in cells if cell.speedup() is not None]
    if not timed:
        return []
    ours = [cell.speedup() for cell in timed]
    return [
        verdicts.mean_over("all cells, best peers of the table", ours, [figure(cell.name, cell.dtype)[0] for cell in timed]),
        verdicts.mean_over("all cells, best peers of this run", ours, [cell.best_peer for cell in timed]),
    ]
