"""What `make bench-overlap` measures: the cells that the project's claims are about, each with few layers that still show its pattern.

Communication's share of a step follows from the feed-forward width, the dtype and the link; widths are chosen so that shares of 25 to 40 %
and of one half come about on two cores. Long prompts run two or three layers: a layer repeats, and what stands alone at both ends of a step
(the embedding's sum, the last part's last sum) weighs more there than in a whole model, never less.
"""

from __future__ import annotations

from typing import NamedTuple

from overlap.model import Shape
from overlap.report import SHARED

FAST, SLOW = "1 Gbit/s", "300 Mbit/s"
MIXED = (4, 256, 512)                                # sequences that decode, their past, and the prompt beside them


class Cell(NamedTuple):
    """One link, model and step. tokens 0: the batch MIXED."""

    link: str
    shape: Shape
    tokens: int

    @property
    def label(self) -> str:
        shape = self.shape
        return f"{shape.hidden}/{shape.ffn} x {shape.layers} {shape.dtype}" + (f", {shape.experts} experts" if shape.experts else "")

    @property
    def counts(self) -> list[int]:
        return [self.tokens] if self.tokens else [1] * MIXED[0] + [MIXED[2]]


def _cells(link: str, ffn: int, layers: int, *tokens: int, **more) -> list[Cell]:
    return [Cell(link, Shape(ffn=ffn, layers=layers, **more), each) for each in tokens]


GRID = (
    *_cells(FAST, 2048, 6, 512, 0), *_cells(FAST, 2048, 4, 256, 512), *_cells(FAST, 2048, 3, 1024), *_cells(FAST, 2048, 2, 2048),
    *_cells(FAST, 2048, 1, 4096),
    *_cells(FAST, 4096, 6, 512, dtype="bfloat16"), *_cells(FAST, 1024, 6, 512, dtype="bfloat16"),
    *_cells(SLOW, 8192, 3, 512), *_cells(SLOW, 8192, 2, 1024), *_cells(SLOW, 3072, 4, 512), *_cells(SLOW, 3072, 3, 0),
    *_cells(SLOW, 8192, 4, 512, dtype="bfloat16"), *_cells(SLOW, 2048, 4, 256), *_cells(SLOW, 2048, 2, 512, experts=8),
    *_cells(SHARED, 8192, 2, 256, 512, 1024),
)
LINEAR_ROWS = (512, 2048)
