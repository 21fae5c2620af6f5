"""RMS norm with its weight: the layer around hetero_attn.norm.rms_norm. Weights are small and replicated on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from hetero_attn.norm import rms_norm
from hetero_attn.parallel.linear import empty_parameter
from hetero_attn.parallel.sharding import Shard


class RMSNorm(nn.Module):
    """x [..., width] -> the same shape and dtype. weight_offset 1 multiplies by (1 + weight)."""

    rms_norm = staticmethod(rms_norm)            # plain torch's, until the decoder puts its backend's there

    def __init__(self, name: str, width: int, eps: float, weight_offset: int = 0, *, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.name, self.eps, self.weight_offset = name, eps, weight_offset
        self.weight = empty_parameter(width, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rms_norm(x, self.weight, self.eps, self.weight_offset)

    def shards(self, prefix: str) -> Iterator[Shard]:
        yield Shard(f"{prefix}{self.name}.weight", tuple(self.weight.shape), (), self.weight)
