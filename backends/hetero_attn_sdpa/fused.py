"""The fused route: torch's SDPA kernels, and what they cannot express.

On the CPU torch's flash kernel also hands out the log-sum-exp, through the operator that F.scaled_dot_product_attention itself
calls; elsewhere an lse (and with it sinks, which are a correction by the lse) goes the composed way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hetero_attn.spec import HALF_DTYPES, AttentionSpec, dtype_name

FLASH_FOR_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def fused_objections(spec: AttentionSpec) -> list[str]:
    """Why SDPA's kernels cannot express the call; [] = they can."""
    objections = []
    if spec.softcap:
        objections.append(f"softcap is {spec.softcap:g}, SDPA has none")
    if spec.return_lse or spec.sinks:
        wanted = "sinks need the lse" if spec.sinks else "lse is asked for"
        if spec.device != "cpu":
            objections.append(f"{wanted}, SDPA hands none out on {spec.device}")
        elif spec.v_head_dim != spec.head_dim:
            objections.append(f"{wanted} and v_head_dim is {spec.v_head_dim}, SDPA's lse kernel wants head_dim's {spec.head_dim}")
        elif spec.mask is not None:
            objections.append(f"{wanted} under a mask, SDPA's lse is wrong for rows that a mask empties")
        elif spec.needs_grad:
            objections.append(f"{wanted} with gradients, SDPA's lse kernel has none through the lse")
    if spec.scale <= 0 and spec.rows_differ:
        objections.append(f"scale is {spec.scale:g}, SDPA's kernels mask before they scale and want it positive")
    if spec.needs_grad and spec.mask is not None and spec.mask != torch.bool:
        objections.append("gradients under a float mask, SDPA's backward is wrong for rows of finfo.min")
    float_bias = spec.alibi or (spec.mask is not None and spec.mask != torch.bool)
    if float_bias and spec.dtype in HALF_DTYPES and spec.device != "cpu":
        objections.append(f"float masks and alibi are added in float32, SDPA on {spec.device} would round them to {dtype_name(spec.dtype)}")
    return objections


def fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, is_causal: bool, bias: torch.Tensor | None, want_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q [B, Hq, Sq, D], k, v [B, Hkv, Skv, ·], bias float or bool, broadcastable to [B, Hq, Sq, Skv] -> out, lse [B, Hq, Sq].

    is_causal is torch's (top-left): pass it for Sq == Skv only.
    """
    B, Hq, Sq, D = q.shape
    Hkv = k.shape[1]
    if bias is None and not is_causal and Sq == 1 and Hq != Hkv:
        # Decode: the query heads of a group become query rows, so that each key is read once a group, not once a head
        # (12 to 40 times faster in half precision on the CPU).
        out, lse = fused_attention(q.reshape(B, Hkv, Hq // Hkv, D), k, v, scale, False, None, want_lse)
        return out.reshape(B, Hq, 1, -1), None if lse is None else lse.reshape(B, Hq, 1)
    if want_lse:
        # Called directly, the operator trusts its caller: it reads the last axis as if its stride were 1.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        return FLASH_FOR_CPU(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, bias, 0.0, is_causal, scale=scale, enable_gqa=Hq != Hkv), None
