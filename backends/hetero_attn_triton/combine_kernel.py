"""Where a row's keys were split: the partial sums of its splits become one row, the sink joins, the row is divided and stored.

Each split of attention_forward left its top score, the sum of its weights below that top, and its sum of weighted values. A split that saw
no key has a top of -inf and counts for nothing; a row none of whose splits saw a key is zeros.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit(do_not_specialize=["q_len", "lse_batch", "lse_head", "splits", "partial_rows"])
def attention_combine(
    PARTIAL_OUT, PARTIAL_TOP, PARTIAL_TOTAL, OUT, LSE, SINKS, out_batch, out_head, out_token, lse_batch, lse_head,
    q_len, splits, partial_rows, v_head_dim,
    Q_HEADS: tl.constexpr, PLAIN: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
):
    """One program a row, in the order (token, head). q_len: tokens of a batch entry (all of them where packed). BLOCK_S >= splits."""
    row = tl.program_id(0).to(tl.int64)
    head = row % Q_HEADS
    batch = row // Q_HEADS // q_len
    token = row // Q_HEADS % q_len
    unit: tl.constexpr = 1.0 if PLAIN else LOG2E
    offs_s = tl.arange(0, BLOCK_S)
    offs_v = tl.arange(0, BLOCK_V)
    tops = tl.load(PARTIAL_TOP + offs_s * partial_rows.to(tl.int64) + row, mask=offs_s < splits, other=NEG_INF)
    totals = tl.load(PARTIAL_TOTAL + offs_s * partial_rows.to(tl.int64) + row, mask=offs_s < splits, other=0.0)
    top = tl.max(tops, 0)
    sink = NEG_INF
    if HAS_SINKS:
        sink = tl.load(SINKS + head).to(tl.float32) * (LOG2E if PLAIN else 1.0)
        top = tl.maximum(top, sink)
    safe = tl.where(top == NEG_INF, 0.0, top)
    total = tl.sum(totals * tl.exp2((tops - safe) * unit), 0)
    if HAS_SINKS:
        total += tl.exp2((sink - safe) * unit)
    acc = tl.zeros([BLOCK_V], tl.float32)
    offs_c = tl.arange(0, CHUNK)
    for first in range(0, splits, CHUNK):
        split = first + offs_c
        at = split * partial_rows.to(tl.int64) + row
        share = tl.exp2((tl.load(PARTIAL_TOP + at, mask=split < splits, other=NEG_INF) - safe) * unit)                   # [CHUNK]
        part = tl.load(PARTIAL_OUT + at[:, None] * v_head_dim + offs_v[None, :],
                       mask=(split < splits)[:, None] & (offs_v[None, :] < v_head_dim), other=0.0)
        acc += tl.sum(part * share[:, None], 0)
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    tl.store(OUT + batch * out_batch + token * out_token + head * out_head + offs_v, (acc / divisor).to(OUT.dtype.element_ty),
             mask=offs_v < v_head_dim)
    if HAS_LSE:
        lse = tl.where(empty, NEG_INF, top * (LN2 if PLAIN else 1.0) + tl.log(divisor))
        tl.store(LSE + batch * lse_batch + head * lse_head + token, lse)
