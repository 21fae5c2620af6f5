"""One dense problem: choose the route, cut the query rows into chunks, put the pieces together.

Chunks bound the memory of masks and scores (an ALiBi bias over 32 heads and 8192² scores would be 8 GiB) and make a sliding
window cost what it sees: each chunk takes only the keys between its first row's left edge and its last row's right edge.
"""

from __future__ import annotations

import torch

from hetero_attn.spec import AttentionSpec, Operands
from hetero_attn_sdpa.composed import composed_attention
from hetero_attn_sdpa.fused import fused_attention, fused_objections
from hetero_attn_sdpa.visibility import chunk_bias, key_range, surely_finite, tainted_rows

CHUNK_BYTES = {True: 64 << 20, False: 8 << 20}     # of one chunk: the bias (fused), or the scores (composed: they should stay in a cache)
CHUNK_ROWS = 16                   # never fewer rows than this, or the products become slivers
NEG_INF = float("-inf")


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv] -> out [B, Hq, Sq, Dv], lse [B, Hq, Sq] or None.

    Lengths come from the tensors (a packed call runs each of its sequences through here with one spec).
    """
    Hq, Sq, Skv = q.shape[1], q.shape[2], k.shape[2]
    arithmetic = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.numel() == 0 or Skv == 0:
        out, lse = _sees_nothing(q, k, v, spec, operands.sinks, arithmetic)
        return out, lse if spec.return_lse else None

    # By position alone a causal or windowed row sees fewer keys; NaN in the others must not reach it.
    taint = None
    if Sq > 1 and (spec.is_causal or spec.windowed) and operands.attn_mask is None:
        if q.device.type != "cpu" or not surely_finite(k, v):           # accelerators: no synchronisation for a check
            taint = tainted_rows(spec, k, v, Sq, Hq)
            k, v = k.nan_to_num(0.0, 0.0, 0.0), v.nan_to_num(0.0, 0.0, 0.0)

    fused = not fused_objections(spec)
    if fused and spec.is_causal and Sq == Skv and not spec.windowed and operands.attn_mask is None and operands.alibi_slopes is None:
        out, lse = fused_attention(q, k, v, spec.scale, Sq > 1, None, spec.return_lse or spec.sinks)
    else:
        out, lse = _by_chunks(q, k, v, spec, operands, arithmetic, fused)
    if fused and operands.sinks is not None:
        out, lse = _join_sinks(out, lse, operands.sinks)
    if taint is not None:
        out = out.masked_fill(taint[..., None], float("nan"))
        lse = None if lse is None else lse.masked_fill(taint, float("nan"))
    return out.to(q.dtype), lse.detach().to(arithmetic) if spec.return_lse else None


def _by_chunks(q, k, v, spec: AttentionSpec, operands: Operands, arithmetic: torch.dtype, fused: bool):
    B, Hq, Sq, _ = q.shape
    Skv = k.shape[2]
    shift = Skv - Sq
    want_lse = spec.return_lse or spec.sinks
    if not fused:
        q, k, v = q.to(arithmetic), k.to(arithmetic), v.to(arithmetic)
    outs, lses = [], []
    step = _chunk_rows(spec, operands, B, Hq, Sq, Skv, fused)
    for first in range(0, Sq, step):
        rows = (first, min(first + step, Sq))
        keys = key_range(spec, rows[0], rows[1] - 1, Sq, Skv)
        q_chunk = q[:, :, rows[0] : rows[1]]
        k_chunk, v_chunk = k[:, :, keys[0] : keys[1]], v[:, :, keys[0] : keys[1]]
        if keys[0] == keys[1]:
            # Fused: the sinks join all rows at the end. Composed: each chunk joins its own.
            out, lse = _sees_nothing(q_chunk, k_chunk, v_chunk, spec, None if fused else operands.sinks, arithmetic)
            outs.append(out)
            lses.append(lse)
            continue
        bias = chunk_bias(spec, rows, keys, shift, operands.attn_mask, operands.alibi_slopes, q.device, arithmetic)
        if fused:
            emptied = _emptied_rows(bias, want_lse)
            if bias is not None and bias.dtype == torch.bool and want_lse:
                bias = torch.zeros(bias.shape, dtype=arithmetic, device=q.device).masked_fill_(~bias, NEG_INF)
            out, lse = fused_attention(q_chunk, k_chunk, v_chunk, spec.scale, False, bias, want_lse)
            if lse is not None and emptied is not None:
                lse = lse.masked_fill(emptied, NEG_INF)
        else:
            out, lse = composed_attention(q_chunk, k_chunk, v_chunk, spec, bias, operands.sinks)
        outs.append(out)
        lses.append(lse)
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2) if want_lse else None


def _chunk_rows(spec: AttentionSpec, operands: Operands, B: int, Hq: int, Sq: int, Skv: int, fused: bool) -> int:
    """Rows a chunk: as many as keep its scores (composed) or its bias (fused) within CHUNK_BYTES."""
    if fused and operands.alibi_slopes is None and operands.attn_mask is None and not (spec.is_causal or spec.windowed):
        return Sq
    if not fused:
        planes = B * Hq
    elif operands.alibi_slopes is not None:
        planes = B * Hq if operands.alibi_slopes.dim() == 2 else Hq
    else:
        planes = 1 if operands.attn_mask is None else operands.attn_mask.shape[0] * operands.attn_mask.shape[1]
    return max(CHUNK_ROWS, min(Sq, CHUNK_BYTES[fused] // (4 * planes * Skv)))


def _emptied_rows(bias: torch.Tensor | None, want_lse: bool) -> torch.Tensor | None:
    """Rows of a chunk that see no key: torch's kernel gives them zeros, as it should, but an lse of 0 instead of -inf."""
    if bias is None or not want_lse:
        return None
    return ~bias.any(-1) if bias.dtype == torch.bool else (bias == NEG_INF).all(-1)


def _join_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sink joins the denominator: out shrinks by exp(lse - lse_with_sink)."""
    joined = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    share = torch.where(joined == NEG_INF, 0.0, torch.exp(lse - torch.where(joined == NEG_INF, 0.0, joined)))
    return out * share[..., None], joined


def _sees_nothing(q, k, v, spec: AttentionSpec, sinks: torch.Tensor | None, arithmetic: torch.dtype):
    """Rows without keys: zeros (tied to the inputs, so that gradients are zeros and not an error), and lse = -inf or the sink."""
    B, Hq, Sq, _ = q.shape
    out = q.new_zeros(B, Hq, Sq, v.shape[3])
    if spec.needs_grad:
        out = out + (q[:, :, :0].sum() + k[:, :, :0].sum() + v[:, :, :0].sum())       # 0 * q.sum() would be NaN where q overflows
    lse = torch.full((B, Hq, Sq), NEG_INF, dtype=arithmetic, device=q.device)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(arithmetic)[None, :, None])
    return out, lse
