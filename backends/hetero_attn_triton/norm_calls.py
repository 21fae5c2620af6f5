"""RMSNorm by the Triton kernels: which tensors they take, and the launches. The meaning is hetero_attn/norm.py."""

from __future__ import annotations

import torch

from hetero_attn.norm import rms_norm
from hetero_attn.spec import HALF_DTYPES
from hetero_attn_triton.launching import Launcher

DTYPES = (*HALF_DTYPES, torch.float32)
MAX_WIDTH = 65536                      # a row stays in the registers of one program


def serves(launcher: Launcher, *tensors: torch.Tensor) -> bool:
    """Whether the kernels take these (x, weight, ...): on the launcher's device, in a dtype they widen, no gradient to record."""
    recording = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    usable = all(each.device.type == launcher.device and each.dtype in DTYPES and not each.is_neg() for each in tensors)
    return usable and not recording and 0 < tensors[0].shape[-1] <= MAX_WIDTH and tensors[0].numel() > 0


def block_of(width: int) -> tuple[int, int]:
    """(columns of a program, its warps): about 16 numbers a thread."""
    block = max(16, 1 << (width - 1).bit_length())
    return block, min(16, max(1, block // 512))


def norm(launcher: Launcher, x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0) -> torch.Tensor:
    """Backend.rms_norm(): x [..., C], weight [C] -> [..., C] in x's dtype. Raises ValueError when weight is not [C]."""
    if weight.shape != x.shape[-1:] or not serves(launcher, x, weight):
        return rms_norm(x, weight, eps, weight_offset)
    C = x.shape[-1]
    rows = x.reshape(-1, C)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, warps = block_of(C)
    launcher.launch("rms_norm", rows.shape[0], (rows, weight.contiguous(), out, rows.stride(0), C, eps, float(weight_offset)),
                    {"OFFSET": bool(weight_offset), "BLOCK": block}, warps, 1, x.device)
    return out


def add_norm(
    launcher: Launcher, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0,
    post_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual [T, C] += x [T, C] (normed by post_weight first, if given), in place; returns rms_norm(residual) [T, C] in x's dtype.

    What Communicator.all_reduce_rms_norm does on one rank, in one pass over memory. Raises ValueError for other shapes.
    """
    if x.shape != residual.shape or x.dim() != 2 or weight.shape != x.shape[-1:]:
        raise ValueError(f"x is {list(x.shape)}, residual {list(residual.shape)}, weight {list(weight.shape)}: "
                         f"expected [T, C] twice, and [C]")
    given = (x, residual, weight) if post_weight is None else (x, residual, weight, post_weight)
    if not serves(launcher, *given) or x.stride(1) != 1 or residual.stride(1) != 1:
        residual += x if post_weight is None else rms_norm(x, post_weight, eps, weight_offset)
        return rms_norm(residual, weight, eps, weight_offset).to(x.dtype)
    T, C = x.shape
    out = torch.empty((T, C), dtype=x.dtype, device=x.device)
    block, warps = block_of(C)
    post = None if post_weight is None else post_weight.contiguous()
    launcher.launch("add_rms_norm", T, (x, residual, weight.contiguous(), post, out, x.stride(0), residual.stride(0), C, eps,
                                        float(weight_offset)),
                    {"OFFSET": bool(weight_offset), "HAS_POST": post is not None, "BLOCK": block}, warps, 1, x.device)
    return out
