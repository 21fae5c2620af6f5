"""An attention call by torch's kernels: which of the two, and what must be done around them to keep the project's meaning.

cuDNN's serves plain dense calls; FlashAttention's everything else (an lse, sinks, windows, alibi, queries and keys of unlike lengths,
packed sequences, decoding on pages). Rows that see different keys are protected from NaN in keys they do not see: such keys and values are
zeroed first, without looking, and rows that do see one become NaN afterwards.
"""

from __future__ import annotations

import torch

from hetero_attn.spec import AttentionSpec, Operands
from hetero_attn_hopper.operators import TorchOperators

NEG_INF = float("-inf")


def attention(
    operators: TorchOperators, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Backend.attention()."""
    if not q.numel() or not k.numel():
        return _sees_nothing(q, v, spec, operands.sinks)
    taint = None
    if rows_see_unlike_keys(spec):
        first, last = _bounds(q, k, spec, operands)
        taint = _tainted(k, v, first, last, spec)                      # [B, Hq, Sq] or [Hq, Tq]
        k, v = k.nan_to_num(0.0, 0.0, 0.0), v.nan_to_num(0.0, 0.0, 0.0)
    if is_plain(spec):
        out, lse = operators.dense(q, k, v, spec.is_causal and spec.q_len > 1, spec.scale), None
    else:
        out, lse = _flash(operators, q, k, v, spec, operands)
        lse = torch.where(lse == float("inf"), NEG_INF, lse)           # FlashAttention's word for a row without keys
    if operands.sinks is not None:
        out, lse = _join_sinks(out, lse, operands.sinks, spec)
    if taint is not None:
        by_row = taint.transpose(0, 1)[..., None] if spec.varlen else taint[..., None]
        out = out.masked_fill(by_row, float("nan"))
        lse = None if lse is None else lse.masked_fill(taint, float("nan"))
    return out, lse if spec.return_lse else None


def is_plain(spec: AttentionSpec) -> bool:
    """Whether cuDNN's kernel expresses the call: torch's causality is top-left, so lengths must agree, or a lone query see everything."""
    further = spec.varlen or spec.windowed or spec.alibi or spec.sinks or spec.return_lse
    return not further and (not spec.is_causal or spec.q_len in (1, spec.kv_len))


def rows_see_unlike_keys(spec: AttentionSpec) -> bool:
    """Whether there may be keys in a call that some row of it does not see."""
    return spec.windowed or (spec.is_causal and spec.q_len > 1)


def _flash(operators, q, k, v, spec: AttentionSpec, operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    window = (spec.window_size[0], 0 if spec.is_causal else spec.window_size[1])
    # A window that is open to the left and closed by causality alone is what the kernel calls causal.
    is_causal = spec.is_causal and window[0] == -1
    window = (-1, -1) if is_causal else window
    slopes = None if operands.alibi_slopes is None else operands.alibi_slopes.float().contiguous()
    if spec.varlen:
        q, k, v = (_by_features(x) for x in (q, k, v))
        starts = operands.cu_seqlens_q.contiguous(), _starts(operands)
        return operators.flash(q, k, v, *starts, spec.q_len, spec.kv_len, is_causal, spec.scale, window, slopes, operands.seqused_k,
                               operands.block_table)
    q, k, v = (_by_features(x.transpose(1, 2)) for x in (q, k, v))                          # [B, S, H, D]
    out, lse = operators.flash(q, k, v, None, None, q.shape[1], k.shape[1], is_causal, spec.scale, window, slopes, None, None)
    return out.transpose(1, 2), lse


def _starts(operands: Operands) -> torch.Tensor:
    """cu_seqlens_k; with pages the operator wants one too, and goes by seqused_k."""
    if operands.cu_seqlens_k is not None:
        return operands.cu_seqlens_k.contiguous()
    return torch.nn.functional.pad(operands.seqused_k.cumsum(0, dtype=torch.int32), (1, 0))


def _by_features(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bounds(q, k, spec: AttentionSpec, operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one-past-last key that every query row sees, int64 [Sq], or [Tq] counted over all packed keys."""
    if spec.varlen:
        starts_q, starts_k = operands.cu_seqlens_q.long(), operands.cu_seqlens_k.long()
        rows = torch.arange(q.shape[0], device=q.device)
        sequence = torch.searchsorted(starts_q[1:], rows, right=True).clamp(max=spec.batch - 1)
        begin, end = starts_k[sequence], starts_k[sequence + 1]
        position = rows - starts_q[sequence + 1] + end                 # bottom-right, among all packed keys
    else:
        begin, end = 0, k.shape[2]
        position = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
        begin, end = torch.full_like(position, begin), torch.full_like(position, end)
    left, right = spec.window_size
    right = 0 if spec.is_causal else right
    first = begin if left < 0 else torch.maximum(begin, torch.minimum(position - left, end))
    last = end if right < 0 else torch.minimum(end, position + right + 1)
    return first, torch.maximum(first, last)


def _tainted(k: torch.Tensor, v: torch.Tensor, first: torch.Tensor, last: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """bool [B, Hq, Sq] or [Hq, Tq]: the rows that see a key or a value that is not finite."""
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))               # [B, Hkv, Skv] or [Tk, Hkv]
    bad = bad.transpose(0, 1) if spec.varlen else bad
    before = torch.nn.functional.pad(bad.cumsum(-1), (1, 0))
    seen = before.index_select(-1, last) - before.index_select(-1, first)
    return (seen > 0).repeat_interleave(spec.group_size, dim=-2)


def _join_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor, spec: AttentionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The sink joins the denominator: out shrinks by exp(lse - lse with it). lse [B, Hq, Sq] or [Hq, Tq]."""
    joined = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    share = torch.where(joined == NEG_INF, 0.0, torch.exp(lse - torch.where(joined == NEG_INF, 0.0, joined)))
    share = share.transpose(0, 1) if spec.varlen else share
    return (out * share[..., None]).to(out.dtype), joined


def _sees_nothing(q, v, spec: AttentionSpec, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Zeros, and an lse of -inf or the sink's logit."""
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    if not spec.return_lse:
        return out, None
    shape = (spec.q_heads, q.shape[0]) if spec.varlen else q.shape[:-1]
    lse = torch.full(shape, NEG_INF, dtype=torch.float32, device=q.device)
    return out, lse if sinks is None else torch.logaddexp(lse, sinks.float()[:, None])
