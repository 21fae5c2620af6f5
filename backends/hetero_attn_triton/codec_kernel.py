"""Packing and unpacking of partial sums on the device: the bytes of hetero_attn/collectives/codec/definition.py, to the bit.

A program takes BLOCK groups of 32 values, as two halves of 16 columns: byte j of a group's nibbles holds value j and value j + half, where
half is 16, or in a last group of n values (n + 1) // 2. Quotients are IEEE's (tl.div_rn), rounding is to nearest even by adding and taking
away 1.5 * 2^23, bf16 is made by integers, and launches forbid fused multiply-adds: the definition rounds products first.
"""

import triton
import triton.language as tl

BF16_LARGEST = tl.constexpr(3.3895313892515355e38)
SMALLEST_SCALE = tl.constexpr(2.0**-126)
STEPS_MOST = tl.constexpr(1e38)
MAGIC = tl.constexpr(12582912.0)                                    # 1.5 * 2^23
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _rounded(x):
    """To the nearest integer, ties to even; beyond 2^20 any integer of that size."""
    return (tl.minimum(tl.maximum(x, -1048576.0), 1048576.0) + MAGIC) - MAGIC


@triton.jit
def _bf16_bits(x):
    """Finite fp32 -> the bits of the nearest bf16, ties to even, int32 in 0..65535 (0x7F80 where it rounds to Inf)."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def _from_bits(bits):
    """bf16's bits, int32 -> fp32."""
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _load_bf16(BODY, at, mask):
    """Two bytes, low first, at any address -> fp32."""
    low = tl.load(BODY + at, mask=mask, other=0).to(tl.int32)
    high = tl.load(BODY + at + 1, mask=mask, other=0).to(tl.int32)
    return _from_bits(low | (high << 8))


@triton.jit
def _store_bits(BODY, at, bits, mask):
    tl.store(BODY + at, (bits & 0xFF).to(tl.uint8), mask=mask)
    tl.store(BODY + at + 1, (bits >> 8).to(tl.uint8), mask=mask)


@triton.jit
def _scale_of(largest, most):
    """The bf16 scale of numbers up to `largest`, as fp32; 0 where it would be too small to divide by."""
    scale = _from_bits(_bf16_bits(tl.div_rn(largest, most)))
    return tl.where(scale < SMALLEST_SCALE, 0.0, scale)


@triton.jit
def _divisor(scale):
    return tl.where(scale > 0.0, scale, INFINITY)


@triton.jit(do_not_specialize=["count", "groups"])
def pack_groups_kernel(X, BODY, BAD, count, groups, most, EIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """X [count] -> BODY: a bf16 scale a group, then the q of all. BAD int32 [programs]: whether a value is not finite."""
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)                                           # [BLOCK]
    here = tl.minimum(count - group * 32, 32)
    half = tl.where(here == 32, 16, (here + 1) // 2)
    j = tl.arange(0, 16)[None, :]
    first = group[:, None].to(tl.int64) * 32 + j
    in_low, in_high = j < half[:, None], (j + half[:, None] < here[:, None]) & (j < half[:, None])
    low = tl.load(X + first, mask=in_low, other=0.0).to(tl.float32)                                  # [BLOCK, 16]
    high = tl.load(X + first + half[:, None], mask=in_high, other=0.0).to(tl.float32)
    fine = (tl.abs(low) < INFINITY) & (tl.abs(high) < INFINITY)
    tl.store(BAD + tl.program_id(0), tl.max(tl.max((fine == 0).to(tl.int32), 1), 0))
    scale = _scale_of(tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1), most + group * 0.0)          # [BLOCK]
    _store_bits(BODY, group.to(tl.int64) * 2, _bf16_bits(scale), group < groups)
    divisor = tl.broadcast_to(_divisor(scale)[:, None], low.shape)
    q_low = tl.minimum(tl.maximum(_rounded(tl.div_rn(low, divisor)), -most), most).to(tl.int32)
    q_high = tl.minimum(tl.maximum(_rounded(tl.div_rn(high, divisor)), -most), most).to(tl.int32)
    edge = 2 * groups.to(tl.int64)
    if EIGHT:
        tl.store(BODY + edge + first, (q_low & 0xFF).to(tl.uint8), mask=in_low)
        tl.store(BODY + edge + first + half[:, None], (q_high & 0xFF).to(tl.uint8), mask=in_high)
    else:
        byte = ((q_low & 15) | ((q_high & 15) << 4)).to(tl.uint8)
        tl.store(BODY + edge + group[:, None].to(tl.int64) * 16 + j, byte, mask=in_low)


@triton.jit(do_not_specialize=["count", "groups"])
def unpack_groups_kernel(BODY, OUT, count, groups, EIGHT: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """BODY -> OUT fp32 [count], written or added to. One value a lane, BLOCK a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    group = at // 32
    scale = _load_bf16(BODY, group * 2, inside)
    edge = 2 * groups.to(tl.int64)
    if EIGHT:
        q = tl.load(BODY + edge + at, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    else:
        q = _nibble(BODY, edge, at, count, inside)
    found = q * scale
    if ADD:
        found = tl.load(OUT + at, mask=inside, other=0.0) + found
    tl.store(OUT + at, found, mask=inside)


@triton.jit
def _nibble(BODY, edge, at, count, inside):
    """The q, as fp32, of value `at` of `count` whose nibbles begin at byte `edge`."""
    here = tl.minimum(count - at // 32 * 32, 32)
    half = tl.where(here == 32, 16, (here + 1) // 2)
    place = at % 32
    upper = place >= half
    byte = tl.load(BODY + edge + at // 32 * 16 + place - tl.where(upper, half, 0), mask=inside, other=0).to(tl.int32)
    return (((tl.where(upper, byte >> 4, byte) & 15) ^ 8) - 8).to(tl.float32)


@triton.jit(do_not_specialize=["first", "count", "features", "edge", "first_row"])
def row_factors_kernel(X, SCALE, MEAN, BODY, BAD, first, count, features, edge, first_row, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    """A program a row: whether a value of it is not finite (BAD int32 [rows]); WRITE: its bf16 factor at byte edge + 2 * row."""
    row = tl.program_id(0)
    begin = (first_row + row) * features.to(tl.int64) - first                                        # of the row, in X
    largest = 0.0
    bad = 0
    for start in range(0, features, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        at = begin + feature
        inside = (feature < features) & (at >= 0) & (at < count)
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        bad = tl.maximum(bad, tl.max((tl.abs(x) < INFINITY).to(tl.int32) ^ 1, 0))
        mean = tl.load(MEAN + feature, mask=inside, other=0.0)
        scale = tl.load(SCALE + feature, mask=inside, other=1.0)
        steps = tl.where(inside, tl.abs(tl.div_rn(x - mean, scale)), 0.0)
        largest = tl.maximum(largest, tl.max(steps, 0))
    tl.store(BAD + row, bad)
    if WRITE:
        factor = _scale_of(tl.minimum(largest, STEPS_MOST) + tl.zeros([1], tl.float32), tl.full([1], 7.0, tl.float32))
        _store_bits(BODY, edge + row.to(tl.int64) * 2 + tl.arange(0, 1), _bf16_bits(factor), tl.full([1], 1, tl.int1))


@triton.jit(do_not_specialize=["first", "skipped", "wide", "features", "outliers"])
def pack_outliers_kernel(X, OUTLIERS, BODY, SATURATED, first, skipped, wide, features, outliers, BLOCK: tl.constexpr):
    """The `wide` outliers among X as bf16, in their order. skipped: outliers before `first`. SATURATED int32 [programs]: became Inf."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < wide
    rank = skipped + place
    feature = tl.load(OUTLIERS + rank % outliers, mask=inside, other=0)
    x = tl.load(X + (rank // outliers * features + feature - first), mask=inside, other=0.0).to(tl.float32)
    over = ((_bf16_bits(tl.abs(x)) >= 0x7F80) & inside).to(tl.int32)
    tl.store(SATURATED + tl.program_id(0), tl.sum(over, 0))
    _store_bits(BODY, place * 2, _bf16_bits(tl.minimum(tl.maximum(x, -BF16_LARGEST), BF16_LARGEST)), inside)


@triton.jit
def _steps(X, REST, SCALE, MEAN, BODY, place, mask, skipped, first, first_row, features, rest, factors_at, FACTORS: tl.constexpr):
    """q before rounding of the values that are no outliers, number `place` among them."""
    rank = skipped + place
    row = rank // rest
    feature = tl.load(REST + rank % rest, mask=mask, other=0)
    x = tl.load(X + (row * features + feature - first), mask=mask, other=0.0).to(tl.float32)
    steps = tl.div_rn(x - tl.load(MEAN + feature, mask=mask, other=0.0), tl.load(SCALE + feature, mask=mask, other=1.0))
    if FACTORS:
        steps = tl.div_rn(steps, _divisor(_load_bf16(BODY, factors_at + (row - first_row) * 2, mask)))
    return steps


@triton.jit(do_not_specialize=["first", "count", "skipped", "first_row", "features", "rest", "factors_at", "edge"])
def pack_features_kernel(
    X, REST, SCALE, MEAN, BODY, SATURATED, first, count, skipped, first_row, features, rest, factors_at, edge,
    FACTORS: tl.constexpr, BLOCK: tl.constexpr,
):
    """The `count` values of X that are no outliers as nibbles from byte `edge` on; the rows' factors are there already."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = tl.minimum(count - group * 32, 32)
    half = tl.where(here == 32, 16, (here + 1) // 2)
    j = tl.arange(0, 16)[None, :]
    place = group[:, None] * 32 + j
    in_low, in_high = j < half[:, None], (j + half[:, None] < here[:, None]) & (j < half[:, None])
    low = _rounded(_steps(X, REST, SCALE, MEAN, BODY, place, in_low, skipped, first, first_row, features, rest, factors_at, FACTORS))
    high = _rounded(_steps(X, REST, SCALE, MEAN, BODY, place + half[:, None], in_high, skipped, first, first_row, features, rest,
                           factors_at, FACTORS))
    q_low = tl.minimum(tl.maximum(low, -8.0), 7.0)
    q_high = tl.minimum(tl.maximum(high, -8.0), 7.0)
    over = ((q_low != low) & in_low).to(tl.int32) + ((q_high != high) & in_high).to(tl.int32)
    tl.store(SATURATED + tl.program_id(0), tl.sum(tl.sum(over, 1), 0))
    high_bits = tl.where(in_high, q_high.to(tl.int32) & 15, 0)
    tl.store(BODY + edge + group[:, None] * 16 + j, ((q_low.to(tl.int32) & 15) | (high_bits << 4)).to(tl.uint8), mask=in_low)


@triton.jit(do_not_specialize=["first", "count", "kept", "skipped", "first_row", "features", "outliers", "factors_at", "edge"])
def unpack_features_kernel(
    BODY, BEFORE, STEP, MEAN, OUT, first, count, kept, skipped, first_row, features, outliers, factors_at, edge,
    FACTORS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):
    """BODY -> OUT fp32 [count]. BEFORE int32 [features + 1]: outliers among the features before each. kept: of `count`, no outliers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = (first + at) // features
    feature = (first + at) % features
    before = tl.load(BEFORE + feature, mask=inside, other=0)
    wide = tl.load(BEFORE + feature + 1, mask=inside, other=0) != before
    outlier = row * outliers + before - skipped                     # outliers of the call before this value
    step = tl.load(STEP + feature, mask=inside, other=0.0)
    if FACTORS:
        step = step * _load_bf16(BODY, factors_at + (row - first_row) * 2, inside)
    q = _nibble(BODY, edge, at - outlier, kept, inside & (wide == 0))
    found = q * step + tl.load(MEAN + feature, mask=inside, other=0.0)
    found = tl.where(wide, _load_bf16(BODY, outlier * 2, inside & wide), found)
    if ADD:
        found = tl.load(OUT + at, mask=inside, other=0.0) + found
    tl.store(OUT + at, found, mask=inside)
