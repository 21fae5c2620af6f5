"""Tensors to launches: a call's struct, its output and workspace, and one or two kernels.

q, k and v go as they lie, by their strides: nothing of their size is copied. Only small operands are brought into the form that the
kernels read (int32 tables contiguous, sinks in fp32; a mask in another dtype than bool, fp16 and fp32 is converted).
"""

from __future__ import annotations

import math

import torch

from hetero_attn.spec import AttentionSpec, Operands
from hetero_attn_volta import abi
from hetero_attn_volta.kernels import COMBINE, COMBINE_ROWS, source_of
from hetero_attn_volta.launching import Launcher
from hetero_attn_volta.tiling import Plan

LARGEST, SMALLEST = 3.4028234663852886e38, 2.0**-126               # fp32's: what a scale or cap beyond becomes
FARTHEST = 1 << 30                                                 # a window beyond any length; -1 is unlimited
BATCH_STEP = 65535                                                 # a grid is at most so many blocks deep


def attention(
    launcher: Launcher, plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Backend.attention() by a plan: shapes as there. out is dense in the layout the caller holds; lse is contiguous."""
    if q.is_neg() or k.is_neg() or v.is_neg():       # lazily negated views: their memory holds the other sign
        q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()
    device, Hq, Dv = q.device, spec.q_heads, spec.v_head_dim
    if spec.varlen:
        Tq = q.shape[0]
        out = torch.empty((Tq, Hq, Dv), dtype=q.dtype, device=device)
        lse = torch.empty((Hq, Tq), dtype=torch.float32, device=device) if spec.return_lse else None
        values, kept = _varlen(q, k, v, out, operands)
        values |= {"lse_stride": (0, Tq), "total_q": Tq}
    else:
        B, _, Sq, _ = q.shape
        shape = (B, Sq, Hq, Dv) if spec.layout == "bshd" else (B, Hq, Sq, Dv)
        out = torch.empty(shape, dtype=q.dtype, device=device)
        out = out.transpose(1, 2) if spec.layout == "bshd" else out
        lse = torch.empty((B, Hq, Sq), dtype=torch.float32, device=device) if spec.return_lse else None
        values = {"q_stride": q.stride(), "k_stride": k.stride(), "v_stride": v.stride(), "out_stride": out.stride(),
                  "lse_stride": (Hq * Sq, Sq), "total_q": B * Sq}
        kept = []
    if not out.numel():
        return out, lse
    further, more_kept = _operands(operands)
    left, right = spec.window_size
    right = 0 if spec.is_causal else right
    values |= further | {
        "q": q.data_ptr(), "k": k.data_ptr(), "v": v.data_ptr(), "out": out.data_ptr(), "lse": 0 if lse is None else lse.data_ptr(),
        "batch": spec.batch, "q_heads": Hq, "kv_heads": spec.kv_heads, "q_len": spec.q_len, "kv_len": spec.kv_len,
        "head_dim": spec.head_dim, "v_head_dim": Dv, "page_size": spec.page_size,
        "left": min(left, FARTHEST), "right": min(right, FARTHEST),
        "splits": plan.splits, "partial_dim": plan.variant.head_dim,
        "vector_q": _moves(q, 8), "vector_k": _moves(k, 8), "vector_v": _moves(v, 8), "vector_out": _moves(out, 4),
    } | _scalars(spec)
    if plan.splits > 1:
        rows = Hq * values["total_q"]
        partial_out = torch.empty((plan.splits, rows, plan.variant.head_dim), dtype=torch.float32, device=device)
        partial_rows = torch.empty((plan.splits, rows, 2), dtype=torch.float32, device=device)
        values |= {"partial_out": partial_out.data_ptr(), "partial_rows": partial_rows.data_ptr()}
        kept += [partial_out, partial_rows]
    kernel, (x, heads, batch), call = source_of(plan.variant), plan.grid, abi.pack(values)
    for first in range(0, batch, BATCH_STEP):
        part = call if first == 0 else abi.pack(values | {"first_batch": first})
        grid = (x, heads, min(BATCH_STEP, batch - first))
        launcher.launch(kernel, grid, (plan.variant.threads,), plan.variant.shared_bytes, part, device)
    if plan.splits > 1:
        launcher.launch(COMBINE, (math.ceil(rows / COMBINE_ROWS),), (32 * COMBINE_ROWS,), 0, call, device)
    del kept, more_kept                              # alive until they are enqueued: the allocator hands memory on in the stream's order
    return out, lse


def _varlen(q, k, v, out, operands: Operands) -> tuple[dict, list]:
    """Strides of packed (or paged) tensors and the tables of lengths; and what the addresses point into."""
    token, head, feature = q.stride()
    out_token, out_head, out_feature = out.stride()
    cu_q = operands.cu_seqlens_q.contiguous()
    values = {"q_stride": (0, head, token, feature), "out_stride": (0, out_head, out_token, out_feature), "cu_q": cu_q.data_ptr()}
    if operands.block_table is None:
        cu_k = operands.cu_seqlens_k.contiguous()
        (k_token, k_head, k_feature), (v_token, v_head, v_feature) = k.stride(), v.stride()
        strides = {"k_stride": (0, k_head, k_token, k_feature), "v_stride": (0, v_head, v_token, v_feature)}
        return values | strides | {"cu_k": cu_k.data_ptr()}, [cu_q, cu_k]
    table, lengths = operands.block_table, operands.seqused_k.contiguous()
    table = table if table.stride(1) == 1 else table.contiguous()
    (k_page, k_token, k_head, k_feature), (v_page, v_token, v_head, v_feature) = k.stride(), v.stride()
    values |= {"k_stride": (k_page, k_head, k_token, k_feature), "v_stride": (v_page, v_head, v_token, v_feature),
               "table": table.data_ptr(), "table_stride": table.stride(0), "lengths": lengths.data_ptr()}
    return values, [cu_q, table, lengths]


def _operands(operands: Operands) -> tuple[dict, list]:
    """Mask, slopes and sinks as fields; and the tensors they point into. A broadcast axis gets stride 0."""
    mask, slopes, sinks, values = operands.attn_mask, operands.alibi_slopes, operands.sinks, {}
    if mask is not None:
        if mask.dtype not in abi.MASK_KINDS or mask.is_neg():
            mask = mask.to(torch.float32).resolve_neg()
        strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))
        values |= {"mask": mask.data_ptr(), "mask_kind": abi.MASK_KINDS[mask.dtype], "mask_stride": strides}
    if slopes is not None:
        slopes = slopes.resolve_neg()
        values |= {"slopes": slopes.data_ptr(), "slopes_stride": slopes.stride() if slopes.dim() == 2 else (0, slopes.stride(0))}
    if sinks is not None:
        sinks = sinks.to(torch.float32).resolve_neg().contiguous()
        values |= {"sinks": sinks.data_ptr()}
    return values, [mask, slopes, sinks]


def _moves(x: torch.Tensor, halves: int) -> int:
    """Whether every row of x begins at a multiple of `halves` elements and its features lie side by side, in whole multiples."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1]) if size > 1]
    side_by_side = x.stride(-1) == 1 and x.shape[-1] % halves == 0
    return int(side_by_side and x.data_ptr() % (2 * halves) == 0 and all(stride % halves == 0 for stride in strides))


def _scalars(spec: AttentionSpec) -> dict[str, float]:
    """scale and softcap as fp32 holds them: struct refuses what is beyond its range."""
    scale = math.copysign(min(abs(spec.scale), LARGEST), spec.scale)
    return {"scale": scale, "softcap": spec.softcap and min(max(spec.softcap, SMALLEST), LARGEST)}
