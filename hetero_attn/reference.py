"""The definition of attention, slow and obvious. Everything fast is compared with this file, so read it as the specification.

One query row at a time: which keys it sees, its scores, its softmax, its weighted sum over the keys it sees and no others
(a key that is excluded by causality, window or length is never multiplied by anything, so NaN there cannot travel).
"""

from __future__ import annotations

import torch

from hetero_attn.backend import Backend
from hetero_attn.spec import FLOAT_DTYPES, AttentionSpec, Operands, dtype_name

NEG_INF = float("-inf")


def reference_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, attn_mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None, sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv] -> out [B, Hq, Sq, Dv], lse [B, Hq, Sq].

    Computes in fp32, or in fp64 when q is fp64. Of `spec` it reads is_causal, scale, window_size and softcap only.
    """
    B, Hq, Sq, _ = q.shape
    Skv, Dv = v.shape[2], v.shape[3]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = Hq // k.shape[1]
    k = k.to(compute).repeat_interleave(group, dim=1)                   # [B, Hq, Skv, D]
    v = v.to(compute).repeat_interleave(group, dim=1)                   # [B, Hq, Skv, Dv]
    j = torch.arange(Skv, device=q.device)                              # key positions [Skv]
    rows, lses = [], []
    for i in range(Sq):
        position = i + Skv - Sq                                         # bottom-right: the last query stands at the last key
        scores = spec.scale * (q[:, :, i, None].to(compute) * k).sum(-1)            # [B, Hq, Skv]
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.to(compute)[..., None] * (position - j).abs()
        sees = torch.ones(B, Hq, Skv, dtype=torch.bool, device=q.device)
        if attn_mask is not None:
            mask_row = attn_mask.expand(B, Hq, Sq, Skv)[:, :, i]
            if mask_row.dtype == torch.bool:
                sees = sees & mask_row
            else:
                scores = scores + mask_row.to(compute)
        if spec.is_causal:
            sees = sees & (j <= position)
        left, right = spec.window_size
        if left >= 0:
            sees = sees & (j >= position - left)
        if right >= 0:
            sees = sees & (j <= position + right)
        scores = scores.masked_fill(~sees, NEG_INF)

        logits = scores if sinks is None else torch.cat([scores, sinks.to(compute)[None, :, None].expand(B, Hq, 1)], dim=-1)
        top = logits.detach().amax(-1) if logits.shape[-1] else torch.full((B, Hq), NEG_INF, dtype=compute, device=q.device)
        top = torch.where(top == NEG_INF, 0.0, top)                     # a row that sees nothing: exp(-inf - 0) = 0
        denominator = (logits - top[..., None]).exp().sum(-1)           # [B, Hq]; the sink joins here and nowhere else
        weights = (scores - top[..., None]).exp()                       # [B, Hq, Skv]
        weighted = torch.where(sees[..., None], weights[..., None] * v, 0.0).sum(-2)            # [B, Hq, Dv]
        empty = denominator == 0
        rows.append(torch.where(empty[..., None], 0.0, weighted / torch.where(empty, 1.0, denominator)[..., None]))
        lses.append(top + denominator.log())                            # log(0) = -inf where nothing is seen
    if not rows:
        nothing = q.sum() + k[:, :, :0].sum() + v[:, :, :0].sum()       # no row: 0, but with q, k and v's gradients
        return q.new_zeros(B, Hq, 0, Dv) + nothing.to(q.dtype), torch.zeros(B, Hq, 0, dtype=compute, device=q.device)
    return torch.stack(rows, dim=2).to(q.dtype), torch.stack(lses, dim=2).detach()


def reference_attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [Tq, Hq, D]; k, v [Tk, Hkv, D] or pages -> out [Tq, Hq, Dv], lse [Hq, Tq]: each sequence is its own dense problem."""
    starts = operands.cu_seqlens_q.tolist()
    outs, lses = [], []
    for b in range(len(starts) - 1):
        if spec.page_size:
            length = int(operands.seqused_k[b])
            pages = operands.block_table[b, : -(-length // spec.page_size)].long()
            keys, values = k[pages].flatten(0, 1)[:length], v[pages].flatten(0, 1)[:length]
        else:
            k_start, k_end = operands.cu_seqlens_k[b : b + 2].tolist()
            keys, values = k[k_start:k_end], v[k_start:k_end]
        slopes = operands.alibi_slopes
        out, lse = reference_attention(
            q[starts[b] : starts[b + 1]].transpose(0, 1)[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None], spec,
            alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[b], sinks=operands.sinks,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    if not outs:
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = q.new_zeros(0, q.shape[1], v.shape[-1]) + q.sum() + k[:0].sum() + v[:0].sum()
        return out, torch.zeros(q.shape[1], 0, dtype=compute, device=q.device)
    return torch.cat(outs), torch.cat(lses, dim=1)


class ReferenceBackend(Backend):
    """The definition as a backend: runs by name on any device, never chosen automatically (it is hundreds of times too slow)."""

    name = "reference"
    judges_lengths = False

    def unsupported_reasons(self, spec: AttentionSpec) -> list[str]:
        if spec.dtype not in FLOAT_DTYPES:
            return [f"dtype is {dtype_name(spec.dtype)}, reference has {', '.join(map(dtype_name, FLOAT_DTYPES))}"]
        return []

    def remarks(self, spec: AttentionSpec) -> list[str]:
        return ["the definition, one query row at a time: for checking, not for speed"]

    def attention(self, q, k, v, spec, operands):
        if spec.varlen:
            out, lse = reference_attention_varlen(q, k, v, spec, operands)
        else:
            out, lse = reference_attention(q, k, v, spec, operands.attn_mask, operands.alibi_slopes, operands.sinks)
        return out, lse if spec.return_lse else None
