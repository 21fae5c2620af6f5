"""An attention call by torch's kernels, or an installed package's: which of them, and what must be done around them to keep the project's
meaning.

cuDNN's serves plain dense calls; torch's FlashAttention an lse, sinks, windows, queries and keys of unlike lengths, packed sequences;
flash-attn or flashinfer, where one is installed, softcap, ALiBi and decoding on pages. Rows that see different keys are protected from NaN
in values they do not see: such values are zeroed first, without looking, and rows that do see one become NaN afterwards. (Keys need none of
it: the kernels replace the score of what a row does not see.) That reads V twice and writes it once, by 5 small launches where causality
alone cuts, about 20 elsewhere; by arithmetic 3 % of a causal call's time at 4096 tokens and 4 query heads a KV head, and more the shorter
the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hetero_attn.spec import AttentionSpec, Operands
from hetero_attn_hopper.operators import TorchOperators
from hetero_attn_hopper.package import Package, serving

NEG_INF, NAN, LARGEST = float("-inf"), float("nan"), float("inf")


def attention(
    operators: TorchOperators, packages: Sequence[Package], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec,
    operands: Operands,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Backend.attention()."""
    if not q.numel() or not k.numel():
        return _sees_nothing(q, v, spec, operands.sinks)
    taint = None
    if rows_see_unlike_keys(spec):
        taint = _tainted(q, v, spec, operands)                         # [B, Hq, Sq] or [Hq, Tq]: 0, or NaN
        v = v.nan_to_num(0.0, 0.0, 0.0)
    if is_plain(spec):
        out, lse = operators.dense(*(_by_features(x) for x in (q, k, v)), spec.is_causal and spec.q_len > 1, spec.scale), None
    else:
        out, lse = _flash(operators, packages, q, k, v, spec, operands)
    if lse is not None and (spec.return_lse or operands.sinks is not None):
        # +inf is said of a row without keys, and of one that has seen NaN.
        first = out[..., 0].transpose(0, 1) if spec.varlen else out[..., 0]
        lse = torch.where(lse == LARGEST, torch.where(first.isnan(), NAN, NEG_INF), lse)
    if operands.sinks is not None:
        out, lse = _join_sinks(out, lse, operands.sinks, spec)
    if taint is not None:
        out = out + (taint.transpose(0, 1) if spec.varlen else taint)[..., None]
    return out, lse if spec.return_lse else None


def needs_package(spec: AttentionSpec) -> bool:
    """Whether the call has what torch's kernels do not express."""
    return bool(spec.softcap or spec.alibi or spec.page_size)


def is_plain(spec: AttentionSpec) -> bool:
    """Whether cuDNN's kernel expresses the call: torch's causality is top-left, so lengths must agree, or a lone query see everything."""
    further = spec.varlen or spec.windowed or spec.sinks or spec.return_lse or needs_package(spec)
    return not further and (not spec.is_causal or spec.q_len in (1, spec.kv_len))


def rows_see_unlike_keys(spec: AttentionSpec) -> bool:
    """Whether there may be keys in a call that some row of it does not see."""
    return spec.windowed or (spec.is_causal and spec.q_len > 1)


def _flash(operators, packages, q, k, v, spec: AttentionSpec, operands: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
    window = (spec.window_size[0], 0 if spec.is_causal else spec.window_size[1])
    # A window that is open to the left and closed by causality alone is what the kernel calls causal.
    is_causal = spec.is_causal and window[0] == -1
    window = (-1, -1) if is_causal else window
    q, k, v = (_by_features(x if spec.varlen else x.transpose(1, 2)) for x in (q, k, v))       # [T, H, D] or [B, S, H, D]
    max_q, starts = spec.q_len, (None, None)
    if spec.varlen:
        starts = operands.cu_seqlens_q.contiguous(), _starts(operands)
        # At a longest query of 1 the kernel takes q for one row a sequence, which an empty sequence gainsays.
        max_q = 2 if spec.q_len == 1 and q.shape[0] != spec.batch else spec.q_len
    arguments = q, k, v, *starts, max_q, spec.kv_len, is_causal, spec.scale, window
    if needs_package(spec):
        slopes = None if operands.alibi_slopes is None else operands.alibi_slopes.float().contiguous()
        out, lse = serving(packages, spec).flash(*arguments, softcap=spec.softcap or 0.0, slopes=slopes, table=operands.block_table,
                                                 used=operands.seqused_k)
    else:
        out, lse = operators.flash(*arguments)
    return (out if spec.varlen else out.transpose(1, 2)), lse


def _starts(operands: Operands) -> torch.Tensor:
    """cu_seqlens_k; of pages the kernel takes its differences alone."""
    if operands.cu_seqlens_k is not None:
        return operands.cu_seqlens_k.contiguous()
    return torch.nn.functional.pad(operands.seqused_k.cumsum(0, dtype=torch.int32), (1, 0))


def _by_features(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bounds(q, v, spec: AttentionSpec, operands: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one-past-last key that every query row sees, int64 [Sq], or [Tq] counted over all packed keys."""
    if spec.varlen:
        starts_q, starts_k = operands.cu_seqlens_q.long(), operands.cu_seqlens_k.long()
        rows = torch.arange(q.shape[0], device=q.device)
        sequence = torch.searchsorted(starts_q[1:], rows, right=True).clamp(max=spec.batch - 1)
        begin, end = starts_k[sequence], starts_k[sequence + 1]
        position = rows - starts_q[sequence + 1] + end                 # bottom-right, among all packed keys
    else:
        begin, end = 0, v.shape[2]
        position = torch.arange(v.shape[2] - q.shape[2], v.shape[2], device=q.device)
        begin, end = torch.full_like(position, begin), torch.full_like(position, end)
    left, right = spec.window_size
    right = 0 if spec.is_causal else right
    first = begin if left < 0 else torch.maximum(begin, torch.minimum(position - left, end))
    last = end if right < 0 else torch.minimum(end, position + right + 1)
    return first, torch.maximum(first, last)


def _tainted(q: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands) -> torch.Tensor:
    """[B, Hq, Sq] or [Hq, Tq] to add to the rows: NaN for those that see a value that is not finite, 0 for the others."""
    largest = torch.linalg.vector_norm(v, LARGEST, -1)                 # [B, Hkv, Skv] or [Tk, Hkv], in one pass; NaN goes through
    if not spec.varlen and spec.is_causal and not spec.windowed and spec.q_len <= spec.kv_len:
        # Each row sees what those above it see: NaN from the first such value on, with 0 * inf = NaN.
        taint = (largest * 0).cumsum(-1)[..., spec.kv_len - spec.q_len :]
    else:
        bad = ~largest.isfinite()
        bad = bad.transpose(0, 1) if spec.varlen else bad
        before = torch.nn.functional.pad(bad.cumsum(-1), (1, 0))
        first, last = _bounds(q, v, spec, operands)
        seen = before.index_select(-1, last) - before.index_select(-1, first)
        taint = torch.where(seen > 0, NAN, 0.0).to(v.dtype)
    return taint.repeat_interleave(spec.group_size, dim=-2)


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
