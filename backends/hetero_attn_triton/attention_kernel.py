"""The attention kernel: prefill, decode and split-KV decode are one kernel with other numbers. Imported only where it is launched.

A program owns BLOCK_M rows. A row is a query of one head; with HEADS > 1 the HEADS query heads that share a key/value head are folded into
rows (row r is position r // HEADS, head r % HEADS), so that a decode step reads K and V once a group. It walks over blocks of BLOCK_N keys:
blocks that no row sees are never touched, those that all rows see are multiplied without a test ("whole"), the others test key by key
("edge"). With SPLITS > 1 a row's blocks are dealt out to several programs, whose partial sums `combine_kernel.py` joins.

Scores: where there is neither softcap, ALiBi nor a float mask, weights are exp2(score * scale * log2(e) - top) by one fused multiply-add,
whose product is not rounded, so that logits of 1e4 stay exact in fp32 (PLAIN). Otherwise scores are made in natural units and the top is
subtracted before anything is multiplied, because a mask's finfo.min times log2(e) would be -inf. Tiles: tiling.py. Meaning: reference.py.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def _tanh(x):
    """Within 2e-7 everywhere, and relatively so near 0, where 1 - 2 / (exp(2x) + 1) would lose all digits."""
    square = x * x
    series = x * (1.0 + square * (-0.3333333333 + square * (0.1333333333 + square * (-0.0539682540 + square * 0.0218694885))))
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp2(2.0 * LOG2E * x) + 1.0))


@triton.jit
def _attend(
    acc, top, total, q, begin, end, low, high, position, slope, mask_rows,
    K, V, MASK, TABLE, k_key, k_feature, v_key, v_feature, k_page, v_page, mask_key, left, right, scale, softcap,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    EDGE: tl.constexpr, GUARD: tl.constexpr, PLAIN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, MASK_KIND: tl.constexpr, PAGE_SIZE: tl.constexpr, WIDE: tl.constexpr,
    PADDED_D: tl.constexpr, PADDED_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """Blocks from key `begin` to `end`, multiples of BLOCK_N apart, of which keys in [low, high) are there. acc fp32 [BLOCK_M, BLOCK_V],
    top, total, position, slope and mask_rows [BLOCK_M]. Returns (acc, top, total)."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    far_d = offs_d.to(tl.int64) if WIDE else offs_d
    far_v = offs_v.to(tl.int64) if WIDE else offs_v
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + offs_n
        inside = (keys >= low) & (keys < high)
        near = offs_n.to(tl.int64) if WIDE else offs_n
        k_rows = near * k_key
        v_rows = near * v_key
        if PAGE_SIZE == 0:                                          # a scalar to where the block begins, 32-bit offsets from there
            k_block = K + tl.cast(start, tl.int64) * k_key
            v_block = V + tl.cast(start, tl.int64) * v_key
        elif PAGE_SIZE % BLOCK_N == 0:                              # a block lies in one page
            page = tl.load(TABLE + start // PAGE_SIZE).to(tl.int64)
            k_block = K + page * k_page + tl.cast(start % PAGE_SIZE, tl.int64) * k_key
            v_block = V + page * v_page + tl.cast(start % PAGE_SIZE, tl.int64) * v_key
        else:
            pages = tl.load(TABLE + keys // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
            slots = (keys % PAGE_SIZE).to(tl.int64)
            k_block = K
            v_block = V
            k_rows = pages * k_page + slots * k_key
            v_rows = pages * v_page + slots * v_key
        k_at = k_block + (k_rows[:, None] + far_d[None, :] * k_feature)                             # [BLOCK_N, BLOCK_D]
        v_at = v_block + (v_rows[:, None] + far_v[None, :] * v_feature)                             # [BLOCK_N, BLOCK_V]
        if EDGE:
            k = tl.load(k_at, mask=inside[:, None] & (offs_d[None, :] < HEAD_DIM), other=0.0)
            v = tl.load(v_at, mask=inside[:, None] & (offs_v[None, :] < V_HEAD_DIM), other=0.0)
        else:
            if PADDED_D:
                k = tl.load(k_at, mask=offs_d[None, :] < HEAD_DIM, other=0.0)
            else:
                k = tl.load(k_at)
            if PADDED_V:
                v = tl.load(v_at, mask=offs_v[None, :] < V_HEAD_DIM, other=0.0)
            else:
                v = tl.load(v_at)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")                                           # [BLOCK_M, BLOCK_N]
        if not PLAIN:
            s = s * scale
        if HAS_SOFTCAP:
            s = softcap * _tanh(s / softcap)
        if HAS_ALIBI:
            s = s - slope[:, None] * tl.abs(position[:, None] - keys[None, :]).to(tl.float32)
        seen = tl.broadcast_to(inside[None, :], s.shape)
        if MASK_KIND != 0:
            m = tl.load(MASK + (mask_rows[:, None] + (keys.to(tl.int64) if WIDE else keys)[None, :] * mask_key), mask=seen, other=0)
            if MASK_KIND == 1:
                seen = seen & (m != 0)
            else:
                s = s + m.to(tl.float32)
        if EDGE:
            if HAS_RIGHT:
                seen = seen & (keys[None, :] <= position[:, None] + right)
            if HAS_LEFT:
                seen = seen & (keys[None, :] >= position[:, None] - left)
        if EDGE or MASK_KIND == 1:
            s = tl.where(seen, s, NEG_INF)
        block_top = tl.max(s, 1)
        if PLAIN:
            block_top = block_top * scale
        new_top = tl.maximum(top, block_top)
        safe = tl.where(new_top == NEG_INF, 0.0, new_top)                                            # a row that has seen nothing yet
        if PLAIN:
            p = tl.exp2(tl.fma(s, scale, -safe[:, None]))
            factor = tl.exp2(top - safe)
        else:
            p = tl.exp2((s - safe[:, None]) * LOG2E)
            factor = tl.exp2((top - safe) * LOG2E)
        total = total * factor + tl.sum(p, 1)
        acc = acc * factor[:, None]
        if GUARD:                                                   # 0 * NaN is NaN: keep values that a row does not see out of its sum
            finite = tl.abs(v.to(tl.float32)) < float("inf")
            spoiled = tl.max((finite == 0).to(tl.int32), 1)                                          # [BLOCK_N]
            if tl.max(spoiled, 0) != 0:
                v = tl.where(finite, v, 0.0)
                tainted = tl.max((seen & (spoiled[None, :] != 0)).to(tl.int32), 1)                   # rows that do see one
                acc = tl.where(tainted[:, None] != 0, float("nan"), acc)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["mask_batch", "mask_head", "mask_row", "slope_batch", "table_batch", "lse_batch", "lse_head", "q_len",
                               "kv_len", "tiles", "splits", "partial_rows", "left", "right"])
def attention_forward(
    Q, K, V, OUT, LSE, SLOPES, SINKS, MASK, CU_Q, CU_K, TABLE, LENGTHS, PARTIAL_OUT, PARTIAL_TOP, PARTIAL_TOTAL,
    q_batch, q_head, q_token, q_feature, k_batch, k_head, k_key, k_feature, v_batch, v_head, v_key, v_feature,
    out_batch, out_head, out_token, mask_batch, mask_head, mask_row, mask_key, slope_batch, table_batch, lse_batch, lse_head,
    q_len, kv_len, tiles, splits, partial_rows, left, right, scale, softcap,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, UNIT: tl.constexpr, V_UNIT: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, VARLEN: tl.constexpr, PAGE_SIZE: tl.constexpr,
    SPLIT: tl.constexpr, PLAIN: tl.constexpr, GUARD: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr, MASK_KIND: tl.constexpr,
    WIDE: tl.constexpr, PADDED_D: tl.constexpr, PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, CAREFUL: tl.constexpr,
):
    """Strides are elements, those of q and k in units of UNIT, of v and out of V_UNIT: multiplied here, so that the compiler knows that
    rows begin at 16 bytes also where a stride is a multiple of 8 and not of 16, as at 72 features. k_batch and v_batch are a page's where
    PAGE_SIZE > 0. One program a (sequence, head or group, split, tile of rows), tiles fastest. q_len, kv_len: of every sequence, or the
    longest where CU_Q, CU_K or LENGTHS hold each one's. right = 0 is causal, left, right < 0 unlimited (HAS_...). scale: times log2(e)
    where PLAIN. partial_rows: tokens * query heads. CAREFUL: keys of a block when a tile is done again for the sake of values that are
    not finite."""
    if WIDE:
        q_batch, q_head, q_token = tl.cast(q_batch, tl.int64), tl.cast(q_head, tl.int64), tl.cast(q_token, tl.int64)
        k_batch, k_head, k_key = tl.cast(k_batch, tl.int64), tl.cast(k_head, tl.int64), tl.cast(k_key, tl.int64)
        v_batch, v_head, v_key = tl.cast(v_batch, tl.int64), tl.cast(v_head, tl.int64), tl.cast(v_key, tl.int64)
        out_batch, out_head, out_token = tl.cast(out_batch, tl.int64), tl.cast(out_head, tl.int64), tl.cast(out_token, tl.int64)
    q_batch, q_head, q_token = q_batch * UNIT, q_head * UNIT, q_token * UNIT
    k_batch, k_head, k_key = k_batch * UNIT, k_head * UNIT, k_key * UNIT
    v_batch, v_head, v_key = v_batch * V_UNIT, v_head * V_UNIT, v_key * V_UNIT
    out_batch, out_head, out_token = out_batch * V_UNIT, out_head * V_UNIT, out_token * V_UNIT
    pid = tl.program_id(0)
    tile = pid % tiles
    rest = pid // tiles
    split = rest % splits
    rest = rest // splits
    heads: tl.constexpr = KV_HEADS if HEADS > 1 else KV_HEADS * GROUP
    head = rest % heads
    batch = rest // heads
    kv_head = head if HEADS > 1 else head // GROUP
    if HAS_RIGHT:
        tile = tiles - 1 - tile                                     # the longest rows first: the last wave is then of short ones
    wide_batch = batch.to(tl.int64)
    if VARLEN:
        first_token = tl.load(CU_Q + batch)
        q_len = tl.load(CU_Q + batch + 1) - first_token
        q_base = first_token.to(tl.int64)
        row_base = q_base
        if PAGE_SIZE > 0:
            kv_len = tl.load(LENGTHS + batch)
            k_start = wide_batch * 0
        else:
            k_start = tl.load(CU_K + batch).to(tl.int64)
            kv_len = tl.load(CU_K + batch + 1) - k_start.to(tl.int32)
    else:
        q_base = wide_batch * 0
        k_start = q_base
        row_base = wide_batch * q_len
    if tile * BLOCK_M >= q_len * HEADS:
        return

    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    query = offs_m // HEADS
    real = query < q_len
    row_head = (kv_head * HEADS + offs_m % HEADS if HEADS > 1 else head + offs_m * 0).to(tl.int64)   # [BLOCK_M]
    position = query + kv_len - q_len                               # bottom-right: the last query stands at the last key
    first_position = tile * BLOCK_M // HEADS + kv_len - q_len
    last_position = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // HEADS, q_len - 1) + kv_len - q_len
    low = 0
    high = kv_len
    whole_low = 0                                                   # keys in [whole_low, whole_high) are seen by every row
    whole_high = kv_len
    if HAS_LEFT:
        low = tl.maximum(first_position - left, 0)
        whole_low = tl.maximum(last_position - left, 0)
    if HAS_RIGHT:
        high = tl.maximum(tl.minimum(last_position + right + 1, kv_len), 0)
        whole_high = tl.maximum(tl.minimum(first_position + right + 1, kv_len), 0)
    begin = low // BLOCK_N * BLOCK_N
    blocks = tl.maximum(high - begin + BLOCK_N - 1, 0) // BLOCK_N
    stop = begin + blocks * BLOCK_N
    if SPLIT:
        share = (blocks + splits - 1) // splits
        begin = tl.minimum(begin + split * share * BLOCK_N, stop)
        stop = tl.minimum(begin + share * BLOCK_N, stop)
    whole_begin = tl.minimum(tl.maximum((whole_low + BLOCK_N - 1) // BLOCK_N * BLOCK_N, begin), stop)
    whole_end = tl.minimum(tl.maximum(whole_high // BLOCK_N * BLOCK_N, whole_begin), stop)

    token = q_base + query                                          # [BLOCK_M]; of the packed axis where VARLEN
    far_d = offs_d.to(tl.int64) if WIDE else offs_d
    q = tl.load(Q + wide_batch * q_batch + token[:, None] * q_token + row_head[:, None] * q_head + far_d[None, :] * q_feature,
                mask=real[:, None] & (offs_d[None, :] < HEAD_DIM), other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], NEG_INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    slope = total
    if HAS_ALIBI:
        slope = tl.load(SLOPES + wide_batch * slope_batch + row_head, mask=real, other=0.0)
    mask_rows = 0
    if MASK_KIND != 0:
        first_query = tile * BLOCK_M // HEADS
        near = tl.where(real, query - first_query, 0)               # 32-bit offsets from where the tile begins
        near_head = offs_m % HEADS
        if WIDE:
            near = near.to(tl.int64)
            near_head = near_head.to(tl.int64)
        mask_rows = near * mask_row + near_head * mask_head
        first_head = (kv_head * HEADS if HEADS > 1 else head).to(tl.int64)
        MASK += wide_batch * mask_batch + first_head * mask_head + first_query.to(tl.int64) * mask_row
    if PAGE_SIZE > 0:
        TABLE += wide_batch * table_batch
        K += kv_head.to(tl.int64) * k_head
        V += kv_head.to(tl.int64) * v_head
    else:
        K += wide_batch * k_batch + k_start * k_key + kv_head.to(tl.int64) * k_head
        V += wide_batch * v_batch + k_start * v_key + kv_head.to(tl.int64) * v_head
    if HAS_LEFT:
        acc, top, total = _attend(
            acc, top, total, q, begin, whole_begin, low, high, position, slope, mask_rows, K, V, MASK, TABLE,
            k_key, k_feature, v_key, v_feature, k_batch, v_batch, mask_key, left, right, scale, softcap, HEAD_DIM, V_HEAD_DIM,
            True, False, PLAIN, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, MASK_KIND, PAGE_SIZE, WIDE, PADDED_D, PADDED_V,
            BLOCK_N, BLOCK_D, BLOCK_V)
    acc, top, total = _attend(
        acc, top, total, q, whole_begin, whole_end, low, high, position, slope, mask_rows, K, V, MASK, TABLE,
        k_key, k_feature, v_key, v_feature, k_batch, v_batch, mask_key, left, right, scale, softcap, HEAD_DIM, V_HEAD_DIM,
        False, False, PLAIN, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, MASK_KIND, PAGE_SIZE, WIDE, PADDED_D, PADDED_V,
        BLOCK_N, BLOCK_D, BLOCK_V)
    acc, top, total = _attend(
        acc, top, total, q, whole_end, stop, low, high, position, slope, mask_rows, K, V, MASK, TABLE,
        k_key, k_feature, v_key, v_feature, k_batch, v_batch, mask_key, left, right, scale, softcap, HEAD_DIM, V_HEAD_DIM,
        True, False, PLAIN, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, MASK_KIND, PAGE_SIZE, WIDE, PADDED_D, PADDED_V,
        BLOCK_N, BLOCK_D, BLOCK_V)
    if GUARD:
        if tl.max(tl.max((acc != acc).to(tl.int32), 1), 0) != 0:    # NaN somewhere: once more, carefully, in blocks that need few registers
            careful_begin = tl.maximum(begin, low // CAREFUL * CAREFUL)   # no block beyond `high`, whose page may not be in the table
            careful_end = tl.minimum(stop, (high + CAREFUL - 1) // CAREFUL * CAREFUL)
            acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            top = tl.full([BLOCK_M], NEG_INF, tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc, top, total = _attend(
                acc, top, total, q, careful_begin, careful_end, low, high, position, slope, mask_rows, K, V, MASK, TABLE,
                k_key, k_feature, v_key, v_feature, k_batch, v_batch, mask_key, left, right, scale, softcap, HEAD_DIM,
                V_HEAD_DIM, True, True, PLAIN, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, MASK_KIND, PAGE_SIZE, WIDE, PADDED_D, PADDED_V,
                CAREFUL, BLOCK_D, BLOCK_V)

    if SPLIT:
        row = split.to(tl.int64) * partial_rows + (row_base + query) * (KV_HEADS * GROUP) + row_head
        tl.store(PARTIAL_OUT + row[:, None] * V_HEAD_DIM + offs_v[None, :], acc, mask=real[:, None] & (offs_v[None, :] < V_HEAD_DIM))
        tl.store(PARTIAL_TOP + row, top, mask=real)
        tl.store(PARTIAL_TOTAL + row, total, mask=real)
    else:
        unit: tl.constexpr = 1.0 if PLAIN else LOG2E                # what makes a difference of tops an exponent of 2
        if HAS_SINKS:                                               # one more logit, which has no value
            sink = tl.load(SINKS + row_head, mask=real, other=NEG_INF).to(tl.float32) * (LOG2E if PLAIN else 1.0)
            new_top = tl.maximum(top, sink)
            safe = tl.where(new_top == NEG_INF, 0.0, new_top)
            factor = tl.exp2((top - safe) * unit)
            total = total * factor + tl.exp2((sink - safe) * unit)
            acc = acc * factor[:, None]
            top = new_top
        empty = total == 0.0
        divisor = tl.where(empty, 1.0, total)
        out = OUT + wide_batch * out_batch + token[:, None] * out_token + row_head[:, None] * out_head + offs_v[None, :]
        tl.store(out, (acc / divisor[:, None]).to(OUT.dtype.element_ty), mask=real[:, None] & (offs_v[None, :] < V_HEAD_DIM))
        if HAS_LSE:
            lse = tl.where(empty, NEG_INF, top * (LN2 if PLAIN else 1.0) + tl.log(divisor))
            tl.store(LSE + wide_batch * lse_batch + row_head * lse_head + token, lse, mask=real)
