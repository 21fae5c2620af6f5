"""The static scales of one sender at one site, and the features that travel in 16 bits: what the calibrated codec looks up.

The same few features are large for every token, so a scale a feature, measured beforehand, needs no bits on the wire, and the largest
1/64 of the features, the same on all ranks, are not squeezed at all (arXiv 2411.07942). The paper's grid is symmetric about 0 and the same
for every token. Ours is about the feature's mean, which needs no bits either, and a bf16 factor a row (16/E bits a value) fits it to the
token: tokens differ in size far more than a feature's share of them does, and without it the first token of a text saturates.
"""

from __future__ import annotations

from bisect import bisect_left

import torch

OUTLIER_SHARE = 64                                   # one feature in so many travels as bf16
LARGEST = 7.0                                        # of symmetric INT4
SCALE_FLOOR = 1e-8                                   # of a feature that was always 0


class FeatureTable:
    """Scales [E], means [E] and outliers [k] of one sender: q = clamp(round((x - mean) / scale / t), -8, 7), x becomes q·(step·t) + mean.

    scale, mean: fp32 [E]. outliers: ascending features, whose scale is Inf, step -0 and mean -0, so that kernels may run over them: x / Inf
    is 0, and adding 0 · -0 + -0 changes no bit. row_factors: whether each row has its own t, on the wire; else t is 1.
    """

    def __init__(self, scale: torch.Tensor, mean: torch.Tensor, outliers: torch.Tensor, *, row_factors: bool = True) -> None:
        """Raises ValueError for outliers that are not ascending features, scales that are not finite or negative, means not finite."""
        self.features, self.row_factors = scale.numel(), row_factors
        self._sorted = outliers.tolist()
        if self._sorted != sorted(set(self._sorted)) or not all(0 <= each < self.features for each in self._sorted):
            raise ValueError(f"outliers are {self._sorted[:8]}…, expected ascending features from 0 to {self.features - 1}")
        if not bool((scale.isfinite() & mean.isfinite() & (scale >= 0)).all()):
            raise ValueError("a feature's scale or mean is not finite, or its scale is negative")
        self.outliers = outliers.to(torch.int32).contiguous()
        self.scale = scale.float().clamp(min=SCALE_FLOOR)
        self.mean, self.step = mean.float().clone(), self.scale.clone()
        self.is_outlier = torch.zeros(self.features, dtype=torch.bool)
        self.is_outlier[self.outliers.long()] = True
        self.scale[self.is_outlier], self.step[self.is_outlier], self.mean[self.is_outlier] = torch.inf, -0.0, -0.0

    def outliers_in(self, first: int, count: int) -> int:
        """How many of `count` values from `first` of the flattened tensor on are outliers'."""
        return self._before(first + count) - self._before(first)

    def rows_in(self, first: int, count: int) -> int:
        """How many row factors go with `count` values from `first` on: one for each row, or part of a row, among them."""
        return (first + count - 1) // self.features - first // self.features + 1 if count and self.row_factors else 0

    def features_of(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The feature of each of these values, int64 [count], and whether it is an outlier, bool [count]."""
        feature = torch.arange(first, first + count) % self.features
        return feature, self.is_outlier[feature]

    def rows_of(self, first: int, count: int) -> torch.Tensor:
        """The place of each of these values' row among those of the call, int64 [count]."""
        return torch.arange(first, first + count) // self.features - first // self.features

    def _before(self, place: int) -> int:
        rows, feature = divmod(place, self.features)
        return rows * len(self._sorted) + bisect_left(self._sorted, feature)


def symmetric_scale(lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    """The paper's scale of a range about 0: max(|min|, |max|) / 7, with its floor."""
    largest = torch.maximum(lowest.abs(), highest.abs())
    return (largest / largest.new_tensor(LARGEST)).clamp(min=SCALE_FLOOR)


def outliers_of(ranges: torch.Tensor) -> torch.Tensor:
    """ranges R_j [E], summed over ranks -> the ⌊E/64⌋ features with the largest, ascending int32; of equals the earlier feature."""
    order = torch.sort(ranges, descending=True, stable=True).indices[: ranges.numel() // OUTLIER_SHARE]
    return order.sort().values.to(torch.int32)
