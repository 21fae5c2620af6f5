"""What the low-bit codecs mean: the definition against bytes made by hand, its bounds, and what is refused.

Native kernels are held to it in test_codec_native.py, ranks in test_codec_ranks.py.
"""

import dataclasses
import math
import struct

import pytest
import torch

from hetero_attn.collectives.codec import NAMES, Codecs
from hetero_attn.collectives.codec.calibration import Calibration, CalibrationError, SiteRanges
from hetero_attn.collectives.codec.definition import TorchKernels, features_size, groups_size, nibbles_size, pack_nibbles, unpack_nibbles
from hetero_attn.collectives.codec.features import FeatureTable, outliers_of, symmetric_scale
from hetero_attn.collectives.codec.measure import MovingRange
from hetero_attn.collectives.coding import Plain

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TORCH = TorchKernels()


def bf16_bytes(*values: float) -> list[int]:
    """Little-endian bf16 of values that are exact in it, without torch."""
    return [byte for value in values for byte in struct.pack("<f", value)[2:]]


def table_of(magnitude, outliers=(), mean=0.0, row_factors=False) -> FeatureTable:
    """Of features that reach from -magnitude to magnitude about a mean."""
    magnitude = torch.tensor(magnitude, dtype=torch.float32)
    mean = torch.zeros_like(magnitude) + torch.as_tensor(mean)
    outliers = torch.tensor(outliers, dtype=torch.int32)
    return FeatureTable(symmetric_scale(-magnitude, magnitude), mean, outliers, row_factors=row_factors)


# ---- the definition, by hand ----------------------------------------------------------------------------------------------------


def test_nibbles_by_hand():
    """A group's byte j: value j below, value j + 16 above; the last group splits what it has."""
    q = torch.tensor([*range(-8, 8), *[3] * 16, 1, -1, 2], dtype=torch.int8)
    low = [value & 15 for value in range(-8, 8)]
    expected = [nibble | 3 << 4 for nibble in low] + [1 | 2 << 4, 15]
    assert pack_nibbles(q).tolist() == expected and len(expected) == nibbles_size(35)
    assert torch.equal(unpack_nibbles(pack_nibbles(q), 35), q)


def test_int4_group32_by_hand():
    values = torch.tensor([7.0, -7.0, 3.4, 3.5, 2.5, -0.6, *[0.0] * 26, 14.0, 1.0, -14.0])
    body = torch.empty(groups_size(35, 4), dtype=torch.uint8)
    assert TORCH.pack_groups(values, 4, body)
    # scales 7/7 and 14/7; q = 7 -7 3 4 (3.5 to even) 2 (2.5 to even) -1 0 ...; then 7 0 (0.5 to even) -7
    assert body.tolist() == [*bf16_bytes(1.0, 2.0), 7, 9, 3, 4, 2, 15, *[0] * 10, 7 | 9 << 4, 0]
    out = torch.empty(35)
    TORCH.unpack_groups(body, 4, out, False)
    assert out.tolist() == [7, -7, 3, 4, 2, -1, *[0] * 26, 14, 0, -14]


def test_int8_group32_by_hand():
    values = torch.tensor([127.0, -127.0, 63.5, 0.4, -1.5])
    body = torch.empty(groups_size(5, 8), dtype=torch.uint8)
    assert TORCH.pack_groups(values, 8, body)
    assert body.tolist() == [*bf16_bytes(1.0), 127, 129, 64, 0, 254]


def test_int4_outliers_by_hand():
    """Rows of 4 features from feature 2 on: outliers as bf16 first, the rest by their own scales, in order across rows."""
    table = table_of([7.0, 100.0, 14.0, 0.7], [1])
    values = torch.tensor([10.0, -0.42, 5.5, 96.0, -100.0])             # features 2 3 | 0 1 2
    body = torch.empty(features_size(2, 5, table), dtype=torch.uint8)
    assert TORCH.pack_features(values, 2, table, body) == 1             # -100 / 2 is beyond -8
    assert body.tolist() == [*bf16_bytes(96.0), 5 | 6 << 4, (-4 & 15) | 8 << 4]      # q = 5 -4 6 (5.5 to even) -8
    out = torch.empty(5)
    TORCH.unpack_features(body, 2, table, out, False)
    assert out.tolist() == pytest.approx([10.0, -0.4, 6.0, 96.0, -16.0])
    kept = out.clone()
    TORCH.unpack_features(body, 2, table, out, True)
    assert torch.equal(out, 2 * kept)


def test_a_mean_moves_the_grid():
    table = table_of([7.0, 7.0], mean=[100.0, -3.0])
    body, out = torch.empty(features_size(0, 2, table), dtype=torch.uint8), torch.empty(2)
    assert TORCH.pack_features(torch.tensor([103.4, -11.5]), 0, table, body) == 0
    assert body.tolist() == [3 | 8 << 4]                                # 3.4 and -8.5 above their means; halves to even
    TORCH.unpack_features(body, 0, table, out, False)
    assert out.tolist() == [103, -11]


def test_row_factors_by_hand():
    """Each row's largest value is 7 steps, outliers apart; a row that is its mean has factor 0; a part of a row has one of its own."""
    table = table_of([7.0, 7.0, 14.0], [1], mean=[0.0, 0.0, 1.0], row_factors=True)
    values = torch.tensor([15.0, 3.5, 900.0, 1.0, 0.0, 5.0, 1.0, -56.0])          # feature 2 | 0 1 2 | 0 1 2 | 0
    body = torch.empty(features_size(2, 8, table), dtype=torch.uint8)
    assert TORCH.pack_features(values, 2, table, body) == 0
    # steps 7 | 3.5 0 | 0 0 | -56: factors 1, 0.5, 0, 8; q = 7, 7 0, 0 0, -7
    assert body.tolist() == [*bf16_bytes(900.0, 5.0), *bf16_bytes(1.0, 0.5, 0.0, 8.0), 7 | 0 << 4, 7 | 0 << 4, 0 | (-7 & 15) << 4]
    out = torch.empty(8)
    TORCH.unpack_features(body, 2, table, out, False)
    assert torch.equal(out, values)


def test_scales_are_deviations():
    rows = torch.randn(512, 4) * torch.tensor([1.0, 5.0, 0.1, 0.0]) + torch.tensor([0.0, 40.0, -2.0, 3.0])
    moving = MovingRange()
    for part in rows.split(100):
        moving.update(part)
    deviation = rows.std(0, correction=0)
    assert torch.allclose(moving.mean, rows.mean(0), atol=1e-5)
    assert torch.allclose(moving.scale, deviation.clamp(min=deviation.median().item() / 16), rtol=1e-4)      # none is 0


def test_saturation_is_beyond_minus_8_and_7():
    """round(x / scale) of 8 and -9 saturate, 7 and -8 do not, and halves go to the even number."""
    table = table_of([7.0])
    body = torch.empty(features_size(0, 4, table), dtype=torch.uint8)
    assert TORCH.pack_features(torch.tensor([7.49, 7.5, -8.5, -8.51]), 0, table, body) == 2


def test_outliers_are_the_largest_ranges():
    ranges = torch.ones(192)
    ranges[[5, 100, 17, 180]] = torch.tensor([3.0, 9.0, 3.0, 3.0])
    assert outliers_of(ranges).tolist() == [5, 17, 100] and outliers_of(torch.ones(63)).tolist() == []


def test_moving_ranges_follow_the_paper():
    moving = MovingRange()
    moving.update(torch.tensor([[1.0, -4.0], [3.0, 0.0]]))
    assert moving.lowest.tolist() == [1, -4] and moving.highest.tolist() == [3, 0]
    moving.update(torch.empty(0, 2))
    moving.update(torch.tensor([[11.0, -2.0]]))
    assert moving.lowest.tolist() == pytest.approx([0.99 * 1 + 0.11, -0.99 * 4 - 0.02])
    assert moving.highest.tolist() == pytest.approx([0.99 * 3 + 0.11, -0.02])
    with pytest.raises(ValueError, match="NaN"):
        moving.update(torch.tensor([[math.inf, 0.0]]))


# ---- bounds ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("exponent", [-44, -30, 0, 30, 38])
def test_a_group_is_off_by_half_a_step(bits, exponent):
    """bf16 values as large as there are keep their place (an fp16 scale would overflow); groups near 0 lose little."""
    values = (torch.rand(4096, dtype=torch.float64) * 2 - 1) * 10.0**exponent
    values = values.clamp(-3.3e38, 3.3e38).to(torch.bfloat16)
    body, out = torch.empty(groups_size(4096, bits), dtype=torch.uint8), torch.empty(4096)
    assert TORCH.pack_groups(values, bits, body)
    TORCH.unpack_groups(body, bits, out, False)
    step = values.double().abs().view(-1, 32).amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    error = (out.double() - values.double()).view(-1, 32).abs()
    assert out.isfinite().all() and (error <= step * 0.505 + (2**-126 * 127 if exponent < -30 else 0)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "width"), [(512, 4096), (8, 4096), (16, 1000), (4, 4097)])
def test_bits_per_value_with_the_header(name, rows, width):
    codecs = Codecs(0, 1)
    ranges = torch.rand(1, width)
    codecs.calibration = Calibration(1, {"s": SiteRanges.symmetric(-ranges, ranges, -ranges[0], ranges[0])})
    coding = codecs.coding(name, "s", width, torch.bfloat16)
    payload = coding.encode(torch.randn(rows * width, dtype=torch.bfloat16), 0)
    bits = 8 * payload.numel() / (rows * width)
    known = {"int4_outliers": 4 + (12 * (width // 64) + 16) / width, "int4_group32": 4.5, "int8_group32": 8.5}[name]
    assert payload.numel() == coding.size(0, rows * width) and known <= bits < known + 28 / (rows * width)
    assert codecs.traffic.total().bits_per_value == bits
    if name == "int4_outliers":
        assert bits <= 4.1875 + 16 / width + 12 / (rows * width)
        plain = Codecs(0, 1)
        plain.calibration = dataclasses.replace(codecs.calibration, row_factors=False, _tables={})
        size = plain.coding(name, "s", width, torch.bfloat16).size(0, rows * width)
        assert 8 * size / (rows * width) <= 4.1875 + 12 / (rows * width)


def test_double_precision_and_the_embedding_travel_as_they_are():
    codecs = Codecs(0, 2)
    assert isinstance(codecs.coding("int4_group32", "layers.0.o_proj", 8, torch.float64), Plain)
    assert isinstance(codecs.coding("int4_outliers", "embed", 8, torch.float32), Plain)


def test_what_is_not_there_is_named():
    codecs = Codecs(0, 2)
    with pytest.raises(ValueError, match="int8_group32"):
        codecs.coding("int3", "s", 8, torch.float32)
    with pytest.raises(ValueError, match="hetero-attn calibrate MODEL --text FILE --tp 2"):
        codecs.coding("int4_outliers", "s", 8, torch.float32)
    one = torch.ones(2, 8)
    codecs.calibration = Calibration(2, {"s": SiteRanges.symmetric(-one, one, -one[0], one[0])})
    codecs.coding("int4_outliers", "s", 8, torch.float32)
    for site, width, text in (("t", 8, "'t' was not calibrated"), ("s", 9, "8 features, the tensor's rows have 9")):
        with pytest.raises(CalibrationError, match=text):
            codecs.coding("int4_outliers", site, width, torch.float32)
    codecs.world_size = 3
    with pytest.raises(CalibrationError, match="of 2 ranks, these are 3"):
        codecs.coding("int4_outliers", "s", 8, torch.float32)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_found(bad, dtype):
    table = table_of([1.0] * 70, [3])
    for place in (0, 3, 68, 69, 100):                                   # an outlier and a short last group too
        values = torch.ones(101, dtype=dtype)
        values[place] = bad
        assert TORCH.pack_features(values, 0, table, torch.empty(features_size(0, 101, table), dtype=torch.uint8)) == -1
        assert not TORCH.pack_groups(values, 4, torch.empty(groups_size(101, 4), dtype=torch.uint8))


def test_an_outlier_beyond_bf16_stays_finite_and_is_counted():
    table = table_of([1.0] * 64, [0])
    values = torch.zeros(64)
    values[0] = -torch.finfo(torch.float32).max
    body, out = torch.empty(features_size(0, 64, table), dtype=torch.uint8), torch.empty(64)
    assert TORCH.pack_features(values, 0, table, body) == 1
    TORCH.unpack_features(body, 0, table, out, False)
    assert out[0] == -torch.finfo(torch.bfloat16).max
