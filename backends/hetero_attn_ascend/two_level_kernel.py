"""The two-level attention kernel in Triton, kept to what triton-ascend 3.2.0 compiles. Imported only where it is launched.

One program a core works through its list of tasks (a sequence, a head, a block of rows), as kernel_launch.py assigns them. The Triton tile
is the level-1 block, BLOCK_M x BLOCK_N as planner.kernel_tiles chooses them: its scores, weights and output are what cross between Cube
and Vector. Level 2 is not written here: how many products and softmax pieces a block is cut into goes to bishengir as launch options
(kernel_tiling.py says why, and what nobody has seen yet). Causality and windows come from the one tiling-mask (tiling_mask.py), loaded only
by blocks that an edge crosses; comparing index matrices would run on the scalar unit. The definition is hetero_attn/reference.py.
"""

import triton
import triton.language as tl


@triton.jit
def _block(
    q, acc, top, total, K, V, k_base, v_base, key_stride_k, key_stride_v, TABLE, page_size, page_stride_k, page_stride_v,
    start, low, high, rows_position, first_position, position_row, row_count, slope, MASK, mask_base, mask_row, mask_key, TILING, side,
    left, right, scale, softcap, offs_m, head_dim, v_head_dim,
    EDGE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    MASK_KIND: tl.constexpr, PAGED: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """One level-1 block: scores, weights, output so far. Returns (acc, top, total)."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    keys = start + offs_n
    inside = (keys >= low) & (keys < high)
    if PAGED:
        page = tl.load(TABLE + keys // page_size, mask=inside, other=0).to(tl.int64)
        slot = (keys % page_size).to(tl.int64)
        k_rows = page * page_stride_k + slot * key_stride_k
        v_rows = page * page_stride_v + slot * key_stride_v
    else:
        k_rows = keys.to(tl.int64) * key_stride_k
        v_rows = keys.to(tl.int64) * key_stride_v
    k = tl.load(K + k_base + k_rows[:, None] + offs_d[None, :], mask=inside[:, None] & (offs_d[None, :] < head_dim), other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale                                       # [BLOCK_M, BLOCK_N]
    if HAS_SOFTCAP:
        s = softcap * (1.0 - 2.0 / (tl.exp(2.0 * s / softcap) + 1.0))                                # tanh
    if HAS_ALIBI:
        s = s - slope[:, None] * tl.abs(rows_position[:, None] - keys[None, :]).to(tl.float32)
    seen = inside[None, :] & (offs_m[:, None] < row_count)
    if MASK_KIND != 0:
        m = tl.load(MASK + mask_base + offs_m[:, None] * mask_row + keys[None, :] * mask_key, mask=seen, other=0)
        if MASK_KIND == 1:
            seen = seen & (m != 0)
        else:
            s = s + m.to(tl.float32)
    if EDGE:
        d = first_position - start
        if HAS_RIGHT:
            at = tl.minimum(tl.maximum(d + right, -BLOCK_M), BLOCK_N - 1)
            window = TILING + (tl.maximum(at, 0) + offs_m[:, None] * position_row) * side + tl.maximum(-at, 0) + offs_n[None, :]
            seen = seen & (tl.load(window) == 0)
        if HAS_LEFT:
            at = tl.minimum(tl.maximum(d - left - 1, -BLOCK_M), BLOCK_N - 1)
            window = TILING + (tl.maximum(at, 0) + offs_m[:, None] * position_row) * side + tl.maximum(-at, 0) + offs_n[None, :]
            seen = seen & (tl.load(window) != 0)
    s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp(s - safe[:, None])
    factor = tl.exp(top - safe)
    total = total * factor + tl.sum(p, 1)
    v = tl.load(V + v_base + v_rows[:, None] + offs_v[None, :], mask=inside[:, None] & (offs_v[None, :] < v_head_dim), other=0.0)
    if UPCAST:
        acc = acc * factor[:, None] + tl.dot(p, v.to(tl.float32), input_precision="ieee")
    else:
        acc = acc * factor[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return acc, new_top, total


@triton.jit
def two_level_attention(
    Q, K, V, OUT, LSE, SLOPES, SINKS, MASK, TILING, TABLE,
    TASKS, CORE_STARTS, Q_BASES, K_BASES, V_BASES, O_BASES, LSE_BASES, Q_LENS, KV_LENS,
    q_head, q_row, k_head, k_key, v_head, v_key, o_head, o_row, lse_head, lse_row, page_stride_k, page_stride_v, page_size, table_row,
    slope_sequence, slope_row, mask_sequence, mask_head, mask_row, mask_key, position_row, heads_per_kv, q_heads_per_task, side,
    left, right, scale, softcap, head_dim, v_head_dim,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr,
    MASK_KIND: tl.constexpr, PAGED: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):
    """Strides are elements. TASKS int32 [n, 3]: sequence, task head, first row; CORE_STARTS int32 [cores + 1]; *_BASES int64 and *_LENS
    int32 a sequence. position_row is 1, or 0 where rows are a group's query heads of one position. Row r of a task stands at key
    kv_len - rows + r (bottom-right). right = 0 is causal; left, right = -1 unlimited."""
    core = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    for task in range(tl.load(CORE_STARTS + core), tl.load(CORE_STARTS + core + 1)):
        sequence = tl.load(TASKS + task * 3)
        head = tl.load(TASKS + task * 3 + 1)
        first_row = tl.load(TASKS + task * 3 + 2)
        rows = tl.load(Q_LENS + sequence)
        kv_len = tl.load(KV_LENS + sequence)
        q_head_index = head * q_heads_per_task
        kv_head = q_head_index // heads_per_kv
        row_count = tl.minimum(BLOCK_M, rows - first_row)
        row = (first_row + offs_m).to(tl.int64)
        real = offs_m < row_count
        # Where the block's first row stands, and its last.
        first_position = tl.where(position_row == 1, first_row + kv_len - rows, kv_len - 1)
        last_position = first_position + (row_count - 1) * position_row
        rows_position = first_position + offs_m * position_row
        low = 0
        high = kv_len
        whole_low = 0                                            # keys in [whole_low, whole_high) are seen by every row of the block
        whole_high = kv_len
        if HAS_LEFT:
            low = tl.maximum(0, first_position - left)
            whole_low = tl.maximum(0, last_position - left)
        if HAS_RIGHT:
            high = tl.maximum(tl.minimum(kv_len, last_position + right + 1), 0)
            whole_high = tl.maximum(tl.minimum(kv_len, first_position + right + 1), 0)
        begin = low - low % BLOCK_N
        edge_end = tl.minimum((whole_low + BLOCK_N - 1) // BLOCK_N * BLOCK_N, tl.maximum(high, begin))
        edge_end = tl.maximum(edge_end, begin)
        whole_end = tl.maximum(whole_high - whole_high % BLOCK_N, edge_end)

        q = tl.load(Q + tl.load(Q_BASES + sequence) + q_head_index.to(tl.int64) * q_head + row[:, None] * q_row + offs_d[None, :],
                    mask=real[:, None] & (offs_d[None, :] < head_dim), other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        slope = tl.zeros([BLOCK_M], tl.float32)
        if HAS_ALIBI:
            slope = tl.load(SLOPES + sequence * slope_sequence + q_head_index + offs_m * slope_row, mask=real, other=0.0)
        k_base = tl.load(K_BASES + sequence) + kv_head.to(tl.int64) * k_head
        v_base = tl.load(V_BASES + sequence) + kv_head.to(tl.int64) * v_head
        mask_base = sequence.to(tl.int64) * mask_sequence + q_head_index * mask_head + first_row.to(tl.int64) * mask_row
        table = TABLE + sequence * table_row
        for start in range(begin, edge_end, BLOCK_N):
            acc, top, total = _block(
                q, acc, top, total, K, V, k_base, v_base, k_key, v_key, table, page_size, page_stride_k, page_stride_v, start, low, high,
                rows_position, first_position, position_row, row_count, slope, MASK, mask_base, mask_row, mask_key, TILING, side,
                left, right, scale, softcap, offs_m, head_dim, v_head_dim,
                True, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, MASK_KIND, PAGED, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
            )
        for start in range(edge_end, whole_end, BLOCK_N):
            acc, top, total = _block(
                q, acc, top, total, K, V, k_base, v_base, k_key, v_key, table, page_size, page_stride_k, page_stride_v, start, low, high,
                rows_position, first_position, position_row, row_count, slope, MASK, mask_base, mask_row, mask_key, TILING, side,
                left, right, scale, softcap, offs_m, head_dim, v_head_dim,
                False, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, MASK_KIND, PAGED, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
            )
        for start in range(whole_end, high, BLOCK_N):
            acc, top, total = _block(
                q, acc, top, total, K, V, k_base, v_base, k_key, v_key, table, page_size, page_stride_k, page_stride_v, start, low, high,
                rows_position, first_position, position_row, row_count, slope, MASK, mask_base, mask_row, mask_key, TILING, side,
                left, right, scale, softcap, offs_m, head_dim, v_head_dim,
                True, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, MASK_KIND, PAGED, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
            )
        if HAS_SINKS:
            sink = tl.load(SINKS + q_head_index + offs_m * slope_row, mask=real, other=float("-inf"))
            new_top = tl.maximum(top, sink)
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            factor = tl.exp(top - safe)
            total = total * factor + tl.exp(sink - safe)
            acc = acc * factor[:, None]
            top = new_top
        divisor = tl.where(total == 0.0, 1.0, total)
        lse = tl.where(total == 0.0, float("-inf"), top + tl.log(divisor))
        tl.store(OUT + tl.load(O_BASES + sequence) + q_head_index.to(tl.int64) * o_head + row[:, None] * o_row + offs_v[None, :],
                 (acc / divisor[:, None]).to(OUT.dtype.element_ty), mask=real[:, None] & (offs_v[None, :] < v_head_dim))
        tl.store(LSE + tl.load(LSE_BASES + sequence) + q_head_index.to(tl.int64) * lse_head + row * lse_row, lse, mask=real)
