"""What calibration looks at: the range, the mean and the deviation of each feature, over batches of text.

The ranges are the paper's moving averages and say which features are outliers. A feature's scale is its deviation about its mean: it tells
features apart as a range does, without the chance that makes one batch's peak, and the row's own factor (features.py) does the rest.
"""

from __future__ import annotations

import torch

from hetero_attn.collectives.codec.features import SCALE_FLOOR

MOMENTUM = 0.99
LEAST_SHARE = 1 / 16         # of the median scale: a feature that lay still in calibration must not set the factor of a row when it stirs


class MovingRange:
    """Minimum and maximum of each feature: the first batch's, then m ← 0.99·m + 0.01·new. And mean and deviation of all rows."""

    def __init__(self) -> None:
        self.lowest: torch.Tensor | None = None                       # fp32 [E]
        self.highest: torch.Tensor | None = None
        self._sum: torch.Tensor | float = 0.0                         # fp64 [E]
        self._squares: torch.Tensor | float = 0.0
        self._rows = 0

    def update(self, batch: torch.Tensor) -> None:
        """batch [..., E] of any float dtype; nothing happens for one without rows. Raises ValueError for NaN or Inf in it."""
        rows = batch.detach().reshape(-1, batch.shape[-1]).to("cpu", torch.float32)
        if not rows.shape[0]:
            return
        lowest, highest = rows.aminmax(dim=0)
        if not bool((highest - lowest).isfinite().all()):
            raise ValueError("a batch holds NaN or Inf")
        wide = rows.double()
        self._sum, self._squares, self._rows = self._sum + wide.sum(0), self._squares + wide.square().sum(0), self._rows + len(rows)
        if self.lowest is None:
            self.lowest, self.highest = lowest, highest
        else:
            self.lowest = MOMENTUM * self.lowest + (1 - MOMENTUM) * lowest
            self.highest = MOMENTUM * self.highest + (1 - MOMENTUM) * highest

    @property
    def mean(self) -> torch.Tensor:
        """fp32 [E]."""
        return (self._sum / self._rows).float()

    @property
    def scale(self) -> torch.Tensor:
        """fp32 [E], the deviation about the mean, and no feature's far below the others'."""
        deviation = (self._squares / self._rows - (self._sum / self._rows).square()).clamp(min=0).sqrt().float()
        return deviation.clamp(min=max(LEAST_SHARE * deviation.median().item(), SCALE_FLOOR))
