"""Calls of torch_npu's two operators: their names for our arguments, contiguity, shapes of what comes back.

Nothing is decided here. `npu` is the torch_npu module (under test: the same module, with CPU references registered under its schemas).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from hetero_attn_ascend.sparse import BAND, MASK, WHOLE, CompressedMask, Sparse

SLOTS = 8                                   # the softmax's maximum and sum are written eight times over; the first counts
CORRECT_EMPTY_ROWS = 2                      # inner_precise: high precision, and rows that a mask empties are computed
MAX_TOKEN = 65535                           # heads x head_dim of one token under BSND stay below it


def _tokens_first(*tensors: torch.Tensor) -> bool:
    """Whether [B, H, S, D] tensors lie in memory as [B, S, H, D] does."""
    return all(x.transpose(1, 2).is_contiguous() for x in tensors) and not all(x.is_contiguous() for x in tensors)


def infer(
    npu: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sparse: Sparse, compressed: CompressedMask,
    mask: torch.Tensor | None, want_lse: bool, block_table: torch.Tensor | None = None, q_lens: list[int] | None = None,
    kv_lens: list[int] | None = None, page_size: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """npu_fused_infer_attention_score: q [B, Hq, Sq, D], k, v [B, Hkv, Skv, D] or pages [blocks, page_size, Hkv, D]
    -> out [B, Hq, Sq, D], lse fp32 [B, Hq, Sq] or None. mask bool [B|1, 1, Sq, Skv], True = masked, under sparse.mode 1."""
    Hq, Hkv = q.shape[1], k.shape[2] if page_size else k.shape[1]
    layout = "BNSD"
    if page_size:
        q, k, v = q.contiguous(), k.contiguous().flatten(2), v.contiguous().flatten(2)              # pages [blocks, page_size, Hkv * D]
    elif _tokens_first(q, k, v) and Hq * q.shape[3] < MAX_TOKEN:
        layout, (q, k, v) = "BSND", (x.transpose(1, 2) for x in (q, k, v))                          # as the caller's memory lies: no copy
    else:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    options: dict[str, Any] = {}
    if sparse.mode == BAND:
        options = {"pre_tokens": sparse.before, "next_tokens": sparse.after}
    if sparse.mode == MASK:
        options = {"atten_mask": mask, "inner_precise": CORRECT_EMPTY_ROWS if q.shape[1 if layout == "BSND" else 2] > 1 else 0}
    elif sparse.mode != WHOLE:
        options["atten_mask"] = compressed.on(q.device)
    if page_size:
        options |= {"block_table": block_table, "block_size": page_size}
    if kv_lens is not None:
        options |= {"actual_seq_lengths": q_lens, "actual_seq_lengths_kv": kv_lens}
    out, lse = npu.npu_fused_infer_attention_score(
        q, k, v, num_heads=Hq, num_key_value_heads=Hkv, input_layout=layout, scale=scale, sparse_mode=sparse.mode,
        softmax_lse_flag=want_lse, **options,
    )
    if layout == "BSND":
        out = out.transpose(1, 2)
    return out, lse[..., 0] if want_lse else None


def fusion(
    npu: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sparse: Sparse, compressed: CompressedMask,
    mask: torch.Tensor | None, want_lse: bool, q_ends: list[int] | None = None, kv_ends: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """npu_fusion_attention. Dense: q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv] -> out [B, Hq, Sq, Dv], lse [B, Hq, Sq].
    Packed: q [T, Hq, D], k, v [Tk, Hkv, ·], q_ends and kv_ends each sequence's last token + 1 -> out [T, Hq, Dv], lse [T, Hq]."""
    packed = q_ends is not None
    Hq, Dv = q.shape[1], v.shape[-1]
    if Dv > q.shape[-1]:                    # the operator wants D >= Dv; features of zeros leave every score as it is
        q, k = (pad(x, (0, Dv - x.shape[-1])) for x in (q, k))
    layout = "TND" if packed else "BNSD"
    options: dict[str, Any] = {}
    if not packed and _tokens_first(q, k, v):
        layout, (q, k, v) = "BSND", (x.transpose(1, 2) for x in (q, k, v))
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if packed:
        # Without it the operator lays maximum and sum out by heads first, in a tensor of the same shape.
        options = {"actual_seq_qlen": q_ends, "actual_seq_kvlen": kv_ends, "softmax_layout": "TND"}
    if sparse.mode == BAND:
        options |= {"pre_tockens": sparse.before, "next_tockens": sparse.after}                     # spelled so
    if sparse.mode == MASK:
        options |= {"atten_mask": mask, "inner_precise": CORRECT_EMPTY_ROWS}
    elif sparse.mode != WHOLE:
        options["atten_mask"] = compressed.on(q.device)
    out, top, total, *_ = npu.npu_fusion_attention(q, k, v, Hq, layout, scale=scale, sparse_mode=sparse.mode, **options)
    lse = top[..., 0] + total[..., 0].log() if want_lse else None
    return out.transpose(1, 2) if layout == "BSND" else out, lse
