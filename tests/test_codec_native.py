"""The native kernels of the low-bit codecs against the definition, byte for byte.

The functions are built alone, once for each instruction set of this CPU, so that all of them are compared and not just the one that serves
here.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_attn.collectives.codec.definition import TorchKernels, features_size, groups_size
from hetero_attn.collectives.codec.features import FeatureTable, symmetric_scale
from hetero_attn.jit import Kernel, compiler_reason

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TORCH = TorchKernels()


def native_sets():
    from hetero_attn_cpu.instruction_sets import of_this_cpu

    return of_this_cpu()


@pytest.fixture(scope="module", params=native_sets(), ids=lambda each: each.name)
def native(request):
    if compiler_reason() is not None:
        pytest.skip(compiler_reason())
    from hetero_attn_cpu.codec_calls import CodecCalls
    from hetero_attn_cpu.library import FLAGS

    kernel = Kernel(f"codec-{request.param.name}", ("cpu/codec.cpp",), flags=(*FLAGS, *request.param.flags), abi_version=1)
    return CodecCalls(kernel.try_load() or kernel.load())


def values_of(count: int, dtype: torch.dtype, seed: int, exponent: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator, dtype=torch.float64) * 10.0**exponent
    values[torch.rand(count, generator=generator) < 0.2] = 0
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def misaligned(size: int) -> torch.Tensor:
    """Bytes at an odd address, as a payload received may lie."""
    return torch.full((size + 1,), 0xA5, dtype=torch.uint8)[1:]


EXPONENTS = st.sampled_from([-40, -6, 0, 3, 38])


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 400), dtype=st.sampled_from(DTYPES), bits=st.sampled_from([4, 8]), seed=st.integers(0, 2**31), exponent=EXPONENTS,
)
def test_native_groups_are_the_definition(native, count, dtype, bits, seed, exponent):
    values, total = values_of(count, dtype, seed, exponent), values_of(count, torch.float32, seed + 1, 0)
    expected, found = misaligned(groups_size(count, bits)), misaligned(groups_size(count, bits))
    assert TORCH.pack_groups(values, bits, expected) and native.pack_groups(values, bits, found)
    assert torch.equal(found, expected)
    same_values(lambda kernels, out, add: kernels.unpack_groups(found, bits, out, add), native, total)
    if count:
        values[seed % count] = math.nan
        assert not native.pack_groups(values, bits, found)


@settings(max_examples=80, deadline=None)
@given(
    features=st.one_of(st.integers(1, 200), st.sampled_from([2047, 2048, 2049, 5000])), first=st.integers(0, 12000),
    count=st.one_of(st.integers(0, 600), st.integers(0, 9000)), share=st.sampled_from([0.0, 1 / 64, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31), exponent=EXPONENTS,
)
def test_native_features_are_the_definition(native, features, first, count, share, dtype, seed, exponent):
    values, total = values_of(count, dtype, seed, exponent), values_of(count, torch.float32, seed + 1, 0)
    generator = torch.Generator().manual_seed(seed)
    outliers = torch.randperm(features, generator=generator)[: int(share * features)].sort().values
    magnitude = torch.rand(features, generator=generator) * min(2 * 10.0**exponent, 1e38)
    mean = magnitude * (torch.rand(features, generator=generator) - 0.5)
    table = FeatureTable(symmetric_scale(-magnitude, magnitude), mean, outliers, row_factors=bool(seed % 2))
    size = features_size(first, count, table)
    expected, found = misaligned(size), misaligned(size)
    saturated = TORCH.pack_features(values, first, table, expected)
    assert native.pack_features(values, first, table, found) == saturated
    assert torch.equal(found, expected)
    same_values(lambda kernels, out, add: kernels.unpack_features(found, first, table, out, add), native, total)
    if count:
        values[seed % count] = -math.inf
        assert native.pack_features(values, first, table, found) == -1


def same_values(unpack, native, total):
    """Written and added, native and torch give the same fp32 bits (signs of zeros included), and write nothing beyond."""
    for accumulate in (False, True):
        expected, room = total.clone(), torch.cat([total, torch.full((70,), math.pi)])
        unpack(TORCH, expected, accumulate)
        unpack(native, room[: total.numel()], accumulate)
        assert torch.equal(room[: total.numel()].view(torch.int32), expected.view(torch.int32))
        assert (room[total.numel() :] == math.pi).all()


def test_without_a_native_backend_torch_packs(monkeypatch):
    from hetero_attn.collectives import codec

    monkeypatch.setenv("HETERO_ATTN_SET", "backends=[sdpa]")
    codec.kernels.cache_clear()
    try:
        assert type(codec.kernels("cpu")) is TorchKernels
    finally:
        codec.kernels.cache_clear()
