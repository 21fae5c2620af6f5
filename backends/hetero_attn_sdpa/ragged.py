"""Packed and paged sequences: each is its own dense problem, one after another.

A packed call costs one dense call a sequence; pages are gathered into contiguous keys first, and only as far as the length
says, so entries of the block table beyond it are never read.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from hetero_attn.spec import AttentionSpec, Operands
from hetero_attn_sdpa.dense import dense_attention


def ragged_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q [Tq, Hq, D]; k, v [Tk, Hkv, D] or pages [num_blocks, page_size, Hkv, D] -> out [Tq, Hq, Dv], lse [Hq, Tq] or None."""
    q_starts = operands.cu_seqlens_q.tolist()
    sequences = _paged(k, v, spec.page_size, operands) if spec.page_size else _packed(k, v, operands)
    slopes = operands.alibi_slopes
    outs, lses = [], []
    for b, (keys, values) in enumerate(sequences):
        rows = q[q_starts[b] : q_starts[b + 1]]
        own = Operands(alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[b], sinks=operands.sinks)
        out, lse = dense_attention(
            rows.transpose(0, 1)[None], keys.transpose(0, 1)[None], values.transpose(0, 1)[None], spec, own
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0] if lse is not None else None)
    if not outs:
        arithmetic = torch.float64 if q.dtype == torch.float64 else torch.float32
        empty_lse = torch.empty(q.shape[1], 0, dtype=arithmetic, device=q.device) if spec.return_lse else None
        return q.new_empty(0, q.shape[1], v.shape[-1]) + q.sum() + k[:0].sum() + v[:0].sum(), empty_lse     # tied, for their gradients
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs), torch.cat(lses, dim=1) if spec.return_lse else None


def _packed(k: torch.Tensor, v: torch.Tensor, operands: Operands):
    starts = operands.cu_seqlens_k.tolist()
    for start, end in pairwise(starts):
        yield k[start:end], v[start:end]


def _paged(k: torch.Tensor, v: torch.Tensor, page_size: int, operands: Operands):
    for b, length in enumerate(operands.seqused_k.tolist()):
        pages = operands.block_table[b, : -(-length // page_size)].long()
        yield k[pages].flatten(0, 1)[:length], v[pages].flatten(0, 1)[:length]
