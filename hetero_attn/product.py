"""torch's own linear, able to write into a buffer that a communicator handed out: what a backend and a communicator start from."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N], into `out` of that shape when given (without a copy where torch can)."""
    if out is None:
        return F.linear(x, weight, bias)
    if out.dim() != 2 or x.dtype != out.dtype or weight.dtype != out.dtype:
        return out.copy_(F.linear(x, weight, bias))
    if bias is None:
        return torch.mm(x, weight.t(), out=out)                                                # [T, K] x [K, N]
    return torch.addmm(bias, x, weight.t(), out=out)
