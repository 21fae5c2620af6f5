"""What calibration looks at: the range, the mean, and the scale with the least error of each feature, over batches of text.

Ranges are the paper's moving averages, so that a rare peak does not spread the sixteen steps over a range that nobody uses. A scale made of
them still leaves some error on the table: a feature that is never 0 wastes half its steps on the other side, and one with a long tail is
better off losing the tail. So a second look at the same text tries scales around it. Both cost nothing on the wire. A row counts there by
the share of its size that is lost, not by its size: the norm that follows divides by it, and the first token of a text may be a hundred
times larger than all others.
"""

from __future__ import annotations

import torch

from hetero_attn.collectives.codec.definition import HIGHEST, LOWEST
from hetero_attn.collectives.codec.features import symmetric_scale

MOMENTUM = 0.99
FACTORS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3)           # of the scale that just covers the range


def rows_of(batch: torch.Tensor) -> torch.Tensor:
    """batch [..., E] -> [rows, E] fp32 on the CPU."""
    return batch.detach().reshape(-1, batch.shape[-1]).to("cpu", torch.float32)


def weights_of(rows: torch.Tensor) -> torch.Tensor:
    """rows [T, E] -> how much each counts, fp32 [T, 1]: one over its mean square."""
    return 1 / rows.pow(2).mean(1, keepdim=True).clamp(min=1e-30)


class MovingRange:
    """Minimum and maximum of each feature: the first batch's, then m ← 0.99·m + 0.01·new. And the weighted mean of all rows."""

    def __init__(self) -> None:
        self.lowest: torch.Tensor | None = None                       # fp32 [E]
        self.highest: torch.Tensor | None = None
        self._sum: torch.Tensor | float = 0.0
        self._weight = 0.0

    @property
    def mean(self) -> torch.Tensor:
        """fp32 [E]."""
        return (self._sum / self._weight).float()

    def update(self, batch: torch.Tensor) -> None:
        """batch [..., E] of any float dtype; nothing happens for one without rows. Raises ValueError for NaN or Inf in it."""
        rows = rows_of(batch)
        if not rows.shape[0]:
            return
        lowest, highest = rows.aminmax(dim=0)
        if not bool((highest - lowest).isfinite().all()):
            raise ValueError("a batch holds NaN or Inf")
        weights = weights_of(rows).double()
        self._sum, self._weight = self._sum + (weights * rows).sum(0), self._weight + weights.sum()
        if self.lowest is None:
            self.lowest, self.highest = lowest, highest
        else:
            self.lowest = MOMENTUM * self.lowest + (1 - MOMENTUM) * lowest
            self.highest = MOMENTUM * self.highest + (1 - MOMENTUM) * highest


class ScaleSearch:
    """Of FACTORS · the scale that covers a range about its mean, the one with the least weighted squared error, feature by feature."""

    def __init__(self, measured: MovingRange) -> None:
        self.mean = measured.mean
        self._base = symmetric_scale(measured.lowest - self.mean, measured.highest - self.mean)
        self._errors = torch.zeros(len(FACTORS), self.mean.numel(), dtype=torch.float64)

    def update(self, batch: torch.Tensor) -> None:
        """batch [..., E] of any float dtype."""
        rows = rows_of(batch)
        root = weights_of(rows).sqrt()
        rows = rows - self.mean
        for place, factor in enumerate(FACTORS):
            scale = factor * self._base
            self._errors[place] += ((rows / scale).round_().clamp_(LOWEST, HIGHEST).mul_(scale) - rows).mul_(root).pow_(2).sum(0)

    @property
    def scale(self) -> torch.Tensor:
        """fp32 [E]."""
        return self._base * torch.tensor(FACTORS)[self._errors.argmin(0)]
