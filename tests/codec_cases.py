"""Codec kernels against the definition, byte for byte and bit for bit: what every backend's are held to, native or Triton's.

A test module gives its kernels and its numbers of values; `groups` and `features` are the two kinds of codec. A pack function may tell by
a tensor, as kernels of a device do.
"""

import math

import torch
from hypothesis import strategies as st

from hetero_attn.collectives.codec.definition import TorchKernels, features_size, groups_size
from hetero_attn.collectives.codec.features import FeatureTable, symmetric_scale

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TORCH = TorchKernels()
COMMON = {"dtype": st.sampled_from(DTYPES), "seed": st.integers(0, 2**31), "exponent": st.sampled_from([-40, -6, 0, 3, 38])}
BITS, SHARES = st.sampled_from([4, 8]), st.sampled_from([0.0, 1 / 64, 0.3, 1.0])


def values_of(count: int, dtype: torch.dtype, seed: int, exponent: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator, dtype=torch.float64) * 10.0**exponent
    values[torch.rand(count, generator=generator) < 0.2] = 0
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def table_of(features: int, share: float, seed: int, exponent: int) -> FeatureTable:
    """Scales about the values' size, `share` of the features outliers; with row factors by the seed."""
    generator = torch.Generator().manual_seed(seed)
    outliers = torch.randperm(features, generator=generator)[: int(share * features)].sort().values
    magnitude = torch.rand(features, generator=generator) * min(2 * 10.0**exponent, 1e38)
    mean = magnitude * (torch.rand(features, generator=generator) - 0.5)
    return FeatureTable(symmetric_scale(-magnitude, magnitude), mean, outliers, row_factors=bool(seed % 2))


def groups(kernels, count: int, dtype: torch.dtype, bits: int, seed: int, exponent: int) -> None:
    values, size = values_of(count, dtype, seed, exponent), groups_size(count, bits)
    expected, found = misaligned(size), misaligned(size)
    assert TORCH.pack_groups(values, bits, expected) and kernels.pack_groups(values, bits, found)
    assert torch.equal(found, expected)
    same_values(lambda of, out, add: of.unpack_groups(found, bits, out, add), kernels, count, seed)
    if count:
        values[seed % count] = math.nan
        assert not kernels.pack_groups(values, bits, found)


def features(kernels, features: int, first: int, count: int, share: float, dtype: torch.dtype, seed: int, exponent: int) -> None:
    values, table = values_of(count, dtype, seed, exponent), table_of(features, share, seed, exponent)
    size = features_size(first, count, table)
    expected, found = misaligned(size), misaligned(size)
    saturated = TORCH.pack_features(values, first, table, expected)
    assert kernels.pack_features(values, first, table, found) == saturated
    assert torch.equal(found, expected)
    same_values(lambda of, out, add: of.unpack_features(found, first, table, out, add), kernels, count, seed)
    if count:
        values[seed % count] = -math.inf
        assert kernels.pack_features(values, first, table, found) < 0


def misaligned(size: int) -> torch.Tensor:
    """Bytes at an odd address, as a payload received may lie."""
    return torch.full((size + 9,), 0xA5, dtype=torch.uint8)[1 : size + 1]


def same_values(unpack, kernels, count: int, seed: int) -> None:
    """Written and added, both give the same fp32 bits (signs of zeros included), and write nothing beyond."""
    total = values_of(count, torch.float32, seed + 1, 0)
    for accumulate in (False, True):
        expected, room = total.clone(), torch.cat([total, torch.full((70,), math.pi)])
        unpack(TORCH, expected, accumulate)
        unpack(kernels, room[:count], accumulate)
        assert torch.equal(room[:count].view(torch.int32), expected.view(torch.int32))
        assert (room[count:] == math.pi).all()
