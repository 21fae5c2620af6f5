"""An attention call as calls of the operators: which one, on which rows, and what is put right around them.

Rows that see no key are taken off beforehand (the operators average over masked keys there) and come back as zeros; rows that a boolean
mask empties are put right afterwards; keys that no row sees are never handed over, and NaN and Inf in keys that only some rows see are kept
from the others; sinks join by the lse. The operators take packed lengths as lists, so those are read back to the host (lengths.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from hetero_attn.spec import AttentionSpec, Operands
from hetero_attn_ascend import limits, operators
from hetero_attn_ascend.lengths import on_host
from hetero_attn_ascend.pages import gathered
from hetero_attn_ascend.sparse import MASK, WHOLE, CompressedMask, Sparse, full_mask, keys_in_reach, rows_without_keys, sparse_of
from hetero_attn_ascend.visibility import finite, finite_packed

NEG_INF = float("-inf")
Result = tuple[torch.Tensor, torch.Tensor | None]
Piece = tuple[int, int, int, int]               # first row, last row + 1, first key, last key + 1 of a packed sequence


@dataclass(frozen=True)
class Operators:
    """torch_npu, and the mask that its sparse modes share."""

    npu: Any
    compressed: CompressedMask

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands) -> Result:
        """As Backend.attention. spec has no softcap, ALiBi or float mask (limits.both)."""
        if spec.varlen:
            out, lse = self._paged(q, k, v, spec, operands) if spec.page_size else self._packed(
                q, k, v, spec, on_host(operands.cu_seqlens_q), on_host(operands.cu_seqlens_k))
        else:
            out, lse = self._dense(q, k, v, spec, operands.attn_mask)
        if operands.sinks is not None:
            out, lse = _join_sinks(out, lse, operands.sinks)
        if spec.varlen and lse is not None:
            lse = lse.T                                                                             # [Hq, Tq]
        return out, lse if spec.return_lse else None

    def _dense(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, attn_mask: torch.Tensor | None) -> Result:
        """out [B, Hq, Sq, Dv], lse [B, Hq, Sq] or None."""
        B, Hq, Sq, _ = q.shape
        Skv = k.shape[2]
        first = rows_without_keys(spec, Sq, Skv) if q.numel() else Sq
        if first == Sq or not v.numel():
            return _nothing(q, v.shape[-1], Sq, spec, head_axis=1)
        sparse, mask, emptied = sparse_of(spec, Sq - first, Skv), None, None
        if attn_mask is not None:
            mask = full_mask(spec, attn_mask, Sq, Skv)[:, :, first:].contiguous()                   # True = masked
            sparse, emptied = Sparse(MASK), mask.all(-1)
        q = q[:, :, first:]
        if q.shape[2] == 1 and sparse.mode != MASK:
            k, v, sparse = _window_of_one(spec, k), _window_of_one(spec, v), Sparse(WHOLE)
        tainted = None
        if q.shape[2] > 1 and sparse.mode not in (WHOLE, MASK):
            k, v, tainted = finite(spec, k, v, q.shape[2], Hq)
        want_lse = spec.return_lse or spec.sinks
        serves = not limits.infer(spec) and (mask is None or mask.shape[1] == 1)                    # infer's masks have one head
        call = operators.infer if serves else operators.fusion
        out, lse = call(self.npu, q, k, v, spec.scale, sparse, self.compressed, _for(call, mask, B), want_lse)
        if tainted is not None:
            out = out.masked_fill(tainted[..., None], float("nan"))
            lse = None if lse is None else lse.masked_fill(tainted, float("nan"))
        if emptied is not None:
            out = out.masked_fill(emptied[..., None], 0.0)
            lse = None if lse is None else lse.masked_fill(emptied, NEG_INF)
        if first:
            empty, empty_lse = _nothing(out, out.shape[-1], first, spec, head_axis=1)
            out, lse = torch.cat([empty, out], dim=2), None if lse is None else torch.cat([empty_lse, lse], dim=2)
        return out, lse

    def _packed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, q_starts: list[int],
                kv_starts: list[int]) -> Result:
        """out [Tq, Hq, Dv], lse [Tq, Hq] or None. Sequences without rows that see a key are left out of the operator's call."""
        want_lse = spec.return_lse or spec.sinks
        whole, whole_lse = _nothing(q, v.shape[-1], q.shape[0], spec, head_axis=1, packed=True)
        pieces: list[Piece] = []
        for b in range(len(q_starts) - 1):
            q_len, kv_len = q_starts[b + 1] - q_starts[b], kv_starts[b + 1] - kv_starts[b]
            first = rows_without_keys(spec, q_len, kv_len)
            if first < q_len:
                end = kv_starts[b + 1]
                pieces.append((q_starts[b] + first, q_starts[b + 1], max(kv_starts[b], end - keys_in_reach(spec, q_len - first)), end))
        if not pieces or not v.numel():
            return whole, whole_lse
        if spec.rows_differ:
            k, v, tainted = finite_packed(spec, q, k, v, pieces)
        # One mode for all: what does not matter at the longest lengths matters at none.
        sparse = sparse_of(spec, max(r1 - r0 for r0, r1, _, _ in pieces), max(k1 - k0 for _, _, k0, k1 in pieces))
        for group in _groups(pieces):
            rows, keys = ([(piece[i], piece[i + 1]) for piece in group] for i in (0, 2))
            out, lse = operators.fusion(
                self.npu, _taken(q, rows), _taken(k, keys), _taken(v, keys), spec.scale, sparse, self.compressed, None, want_lse,
                q_ends=_ends(rows), kv_ends=_ends(keys),
            )
            whole, whole_lse = _put(whole, out, rows), None if lse is None else _put(whole_lse, lse, rows)
        if spec.rows_differ:
            whole = whole.masked_fill(tainted[..., None], float("nan"))
            whole_lse = None if whole_lse is None else whole_lse.masked_fill(tainted, float("nan"))
        return whole, whole_lse

    def _paged(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands) -> Result:
        """out [Tq, Hq, Dv], lse [Tq, Hq] or None: decode on the pages as they lie, everything else on keys gathered from them."""
        q_starts, kv_lens = on_host(operands.cu_seqlens_q), on_host(operands.seqused_k)
        one_each = q_starts == list(range(len(q_starts)))           # a query a sequence
        if one_each and kv_lens and min(kv_lens) > 0 and q.shape[0] and spec.q_len == 1:
            # At one query the operator ignores windows, and a mask would still let a NaN of a masked key through.
            in_window = max(kv_lens) <= keys_in_reach(spec, 1)
            if in_window and not limits.pages(spec) and not limits.page_pool(k, kv_lens, spec.page_size):
                return self._decode(q, k, v, spec, operands.block_table, kv_lens)
        shown = [min(n, keys_in_reach(spec, r1 - r0)) for n, (r0, r1) in zip(kv_lens, pairwise(q_starts))]
        k, v, starts = gathered(k, v, operands.block_table, kv_lens, spec.page_size, shown)
        return self._packed(q, k, v, spec, q_starts, starts)

    def _decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, block_table: torch.Tensor,
                kv_lens: list[int]) -> Result:
        blocks = -(-max(kv_lens) // spec.page_size)
        used = torch.tensor([-(-length // spec.page_size) for length in kv_lens], device=q.device)
        table = block_table[:, :blocks].masked_fill(torch.arange(blocks, device=q.device) >= used[:, None], 0).contiguous()
        out, lse = operators.infer(
            self.npu, q[:, :, None], k, v, spec.scale, Sparse(WHOLE), self.compressed, None, spec.return_lse or spec.sinks,
            block_table=table, q_lens=[1] * len(kv_lens), kv_lens=kv_lens, page_size=spec.page_size,
        )
        return out[:, :, 0], None if lse is None else lse[:, :, 0]


def _for(call: Any, mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """A mask in a shape that the operator documents: infer [B, 1, Sq, Skv] or [1, 1, Sq, Skv]; fusion also [B, Hq, Sq, Skv]."""
    if mask is None or call is operators.infer or mask.shape[1] == 1:
        return mask
    return mask.expand(batch, *mask.shape[1:]).contiguous()


def _window_of_one(spec: AttentionSpec, x: torch.Tensor) -> torch.Tensor:
    """The keys that the last position sees: at one query the operators ignore sparse modes, so the window is cut here."""
    return x[:, :, max(0, x.shape[2] - keys_in_reach(spec, 1)) :]


def _nothing(q: torch.Tensor, v_head_dim: int, rows: int, spec: AttentionSpec, head_axis: int, packed: bool = False) -> Result:
    """Rows without keys: zeros and -inf."""
    shape = (rows, q.shape[1]) if packed else (q.shape[0], q.shape[head_axis], rows)
    lse = torch.full(shape, NEG_INF, dtype=torch.float32, device=q.device) if spec.return_lse or spec.sinks else None
    return q.new_zeros(*shape, v_head_dim), lse


def _join_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> Result:
    """The sink joins the denominator: out shrinks by exp(lse - joined). lse [B, Hq, Sq] or packed [Tq, Hq]."""
    logits = sinks.float()[None, :, None] if lse.dim() == 3 else sinks.float()[None]
    joined = torch.logaddexp(lse, logits)
    share = torch.where(joined == NEG_INF, 0.0, (lse - torch.where(joined == NEG_INF, 0.0, joined)).exp())
    return (out.float() * share[..., None]).to(out.dtype), joined


def _taken(x: torch.Tensor, pieces: list[tuple[int, int]]) -> torch.Tensor:
    """The pieces [start, end) of x's first axis, one after another; x itself where they are all of it."""
    if all(a[1] == b[0] for a, b in pairwise(pieces)):
        return x[pieces[0][0] : pieces[-1][1]]
    return torch.cat([x[start:end] for start, end in pieces])


def _groups(pieces: list[Piece]) -> list[list[Piece]]:
    """The pieces in as few calls as the operator's bounds on packed rows, keys and sequences allow."""
    groups, rows, keys = [], 0, 0
    for piece in pieces:
        r, k = piece[1] - piece[0], piece[3] - piece[2]
        full = not groups or len(groups[-1]) == limits.MAX_PACKED_SEQUENCES
        if full or max(rows + r, keys + k) > limits.MAX_PACKED_TOKENS:
            groups.append([])
            rows = keys = 0
        groups[-1].append(piece)
        rows, keys = rows + r, keys + k
    return groups


def _ends(pieces: list[tuple[int, int]]) -> list[int]:
    ends, total = [], 0
    for start, end in pieces:
        total += end - start
        ends.append(total)
    return ends


def _put(whole: torch.Tensor, x: torch.Tensor, pieces: list[tuple[int, int]]) -> torch.Tensor:
    """`whole` with x's rows at the pieces."""
    if pieces == [(0, whole.shape[0])] or (pieces[0][0] == 0 and pieces[-1][1] == whole.shape[0] and x.shape[0] == whole.shape[0]):
        return x
    done = 0
    for start, end in pieces:
        whole[start:end] = x[done : done + end - start]
        done += end - start
    return whole
