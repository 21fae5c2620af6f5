"""Planning for Volta: what a variant takes of a multiprocessor, what a call is launched as, and whether the model counts what the kernel
does."""

from dataclasses import replace
from itertools import pairwise
from math import ceil
from types import SimpleNamespace

import pytest
import torch
from hetero_attn_volta.tiling import (
    DECODE,
    DECODE_MAX_QUERIES,
    FORWARD,
    MAX_HEAD_DIM,
    MAX_SPLITS,
    VARIANTS,
    Variant,
    occupancy,
    padded,
    plan,
    tile_clocks,
)
from native import needs_compiler
from volta_emulated import NAME, volta_emulated

from hetero_attn import attention
from hetero_attn.profile import load_profile
from hetero_attn.spec import AttentionSpec
from hetero_attn.testing.simt import SimtLauncher

V100 = load_profile("v100").hardware
PREFILL = AttentionSpec("cuda", torch.float16, 1, 32, 8, 4096, 4096, 128, 128, is_causal=True, scale=0.088)
DECODING = replace(PREFILL, q_len=1)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_variant_keeps_its_promise(variant):
    assert variant.shared_bytes <= V100.shared_memory_bytes
    assert occupancy(variant, V100) >= variant.blocks
    assert variant.register_bound * variant.threads * variant.blocks <= 65536
    regions = sorted(variant.regions.values())
    own = [regions[0], *regions[2:]] if variant.one_buffer else regions
    assert all(end <= begin for (_, end), (begin, _) in pairwise(own)), "regions overlap"


def test_occupancy_is_the_tightest_bound():
    variant = Variant("forward", 64, 64, 4, 1, True, False, 1, 2)
    assert variant.shared_bytes == 2 * (2 * 64 * 68 + 4 * 16 * 68) + 16            # K and V, weights of four warps, two words of bits twice
    assert occupancy(variant, V100, registers=64) == 98304 // variant.shared_bytes == 3
    assert occupancy(variant, V100, registers=255) == 2                            # 65536 // (256 * 128)
    assert occupancy(variant, SimpleNamespace(units=80, shared_memory_bytes=30000), registers=64) == 1
    assert occupancy(variant, SimpleNamespace(units=80, shared_memory_bytes=1000)) == 0


@pytest.mark.parametrize(("head_dim", "expected"), [(1, 32), (32, 32), (33, 64), (80, 96), (128, 128), (129, 192), (256, 256)])
def test_head_dims_are_padded(head_dim, expected):
    assert padded(head_dim) == expected


def test_a_head_dim_beyond_the_largest():
    assert padded(MAX_HEAD_DIM) == MAX_HEAD_DIM
    with pytest.raises(ValueError, match="head_dim is 257, kernels have up to 256"):
        padded(257)


def test_every_head_dim_has_both_kernels():
    assert {v.head_dim for v in FORWARD} == {v.head_dim for v in DECODE}


def test_a_prefill_covers_its_rows():
    for q_len in (33, 64, 65, 1000, 4096):
        for head_dim in (32, 64, 80, 128, 192, 256):
            chosen = plan(replace(PREFILL, q_len=q_len, head_dim=head_dim, v_head_dim=head_dim), V100)
            assert chosen.variant.kernel == "forward" and chosen.variant.head_dim == padded(head_dim)
            assert chosen.grid[0] == ceil(q_len / chosen.variant.queries) * chosen.splits and chosen.grid[1:] == (32, 1)
    assert plan(PREFILL, V100).splits == 1


def test_decoding_fills_the_device():
    long = plan(replace(DECODING, kv_len=65536), V100)
    assert long.variant.kernel == "decode" and long.grid == (long.splits, 8, 1)
    assert long.splits * 8 <= V100.units * long.variant.blocks < (long.splits + 1) * 8
    assert plan(replace(DECODING, kv_len=100), V100).splits == 1                    # nothing worth cutting
    assert plan(replace(DECODING, batch=64), V100).splits == 1                      # the device is full already
    assert plan(replace(DECODING, q_heads=1, kv_heads=1, kv_len=1 << 20), V100).splits == MAX_SPLITS


def test_queries_decide_between_the_kernels():
    """Passes over K and V of a KV head: decoding takes one for 16 rows, the forward kernel one for each head of the group."""
    for q_len, kernel in ((1, "decode"), (DECODE_MAX_QUERIES, "decode"), (DECODE_MAX_QUERIES + 1, "forward")):
        for q_heads in (1, 8, 71):
            spec = replace(PREFILL, q_len=q_len, q_heads=q_heads, kv_heads=1)
            assert plan(spec, V100).variant.kernel == kernel
            if kernel == "decode":
                assert ceil(q_len * q_heads / 16) <= q_heads


def test_few_blocks_take_small_tiles_and_many_take_large_ones():
    """D = 64 has two forward variants: 128 queries a block are quicker a query, 64 fill the device sooner."""
    wide = replace(PREFILL, head_dim=64, v_head_dim=64)
    assert plan(replace(wide, batch=8), V100).variant.queries == 128
    assert plan(replace(wide, q_heads=2, kv_heads=2, q_len=4096), V100).variant.queries == 64


def test_empty_calls_have_a_plan():
    for changes in ({"batch": 0}, {"kv_len": 0}, {"q_len": 0}, {"batch": 0, "q_len": 0, "kv_len": 0}):
        chosen = plan(replace(PREFILL, **changes), V100)
        assert min(chosen.grid[:2]) >= 1


@needs_compiler
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_model_counts_what_the_kernel_does(head_dim):
    """Passes over shared memory and tensor-core steps of one more tile, counted in the running kernel, are tile_clocks'."""
    with volta_emulated(SimtLauncher(counted=True)) as launcher:
        def counts(kv_len):
            q, k, v = (torch.randn(1, 1, length, head_dim, dtype=torch.float16) for length in (64, kv_len, kv_len))
            attention(q, k, v, backend=NAME)
            return launcher.launched[-1][1]

        chosen = plan(AttentionSpec("cpu", torch.float16, 1, 1, 1, 64, 256, head_dim, head_dim), V100).variant
        few, more = counts(2 * chosen.keys), counts(3 * chosen.keys)
    clocks = tile_clocks(chosen)
    shared = sum((more.total("shared", way, 8) - few.total("shared", way, 8)).wavefronts for way in ("load", "store"))
    assert shared == clocks["shared"]
    assert (more.instructions["mma"] - few.instructions["mma"]) * 1024 / 512 == clocks["tensor"]
    assert more.instructions["barrier"] - few.instructions["barrier"] == 2
