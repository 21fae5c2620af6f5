"""RMSNorm as the model families define it, in one place: decoder, communicators and the tests of fused kernels share it.

Two orders of rounding exist and 16-bit checkpoints feel the difference, so the family's own order is followed:
Llama (Mistral, Qwen, Mixtral) rounds to x's dtype and then multiplies by the weight; Gemma multiplies by (1 + weight)
in fp32 and rounds once, at the end.
"""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0) -> torch.Tensor:
    """x / sqrt(mean(x**2) + eps) * (weight + weight_offset) over the last axis.

    x [..., C] of any float dtype, weight [C] of any float dtype; returns [..., C] in x's dtype, a new tensor.
    Computed in fp32 (fp64 for fp64). weight_offset 0: Llama's order (LlamaRMSNorm: round, then weight), else Gemma's
    (Gemma2RMSNorm: weight in fp32, then round). Unlike LlamaRMSNorm a weight of a wider dtype does not widen the result.
    Raises ValueError when weight is not [C].
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight is {list(weight.shape)}, expected [{x.shape[-1]}], the last axis of x {list(x.shape)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    normed = x.to(wide)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if weight_offset:
        return (normed * (weight.to(wide) + weight_offset)).to(x.dtype)
    return (weight * normed.to(x.dtype)).to(x.dtype)
