"""The arithmetic and the rules of benchmarks/cpu: what a limit is, which pairs count, where each requirement's boundary lies.

Times need a machine and are `make bench-cpu`'s business; what a time means is plain arithmetic, held here.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "cpu"


@pytest.fixture(scope="module", autouse=True)
def package():
    """benchmarks/cpu under the name its files know it by, for these tests only."""
    spec = importlib.util.spec_from_file_location("cpu", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
    before = sys.modules.get("cpu")
    module = sys.modules["cpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield
    for name in [name for name in sys.modules if name == "cpu" or name.startswith("cpu.")]:
        del sys.modules[name]
    if before is not None:
        sys.modules["cpu"] = before


@pytest.fixture
def shapes():
    return importlib.import_module("cpu.shapes")


@pytest.fixture
def verdicts():
    return importlib.import_module("cpu.verdicts")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [-1, 0, 3])
@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 9), (5, 5), (4, 9), (9, 4)])
def test_visible_pairs_are_those_of_the_reference(shapes, q_len, kv_len, causal, window):
    places = torch.arange(q_len)[:, None] + kv_len - q_len
    keys = torch.arange(kv_len)                         # queries may stand before the first key: place < 0
    seen = torch.ones(q_len, kv_len, dtype=torch.bool)
    if causal:
        seen &= keys <= places
    if window >= 0:
        seen &= keys >= places - window
    assert shapes.visible_pairs(q_len, kv_len, causal, window) == int(seen.sum())


def test_work_and_bytes(shapes):
    causal = shapes.Shape(1, 32, 32, 512, 512, 128, causal=True)
    assert causal.flops == 4 * 32 * (512 * 513 // 2) * 128
    decode = shapes.Shape(8, 32, 8, 1, 2048, 128)
    assert decode.flops == 4 * 8 * 32 * 2048 * 128
    assert decode.kv_bytes("float32") == 2 * decode.kv_bytes("bfloat16") == 2 * 8 * 8 * 2048 * 128 * 4


def test_the_limit_is_the_longer_of_products_and_bytes(shapes):
    decode = shapes.Shape(1, 32, 32, 1, 8192, 128)
    slow_memory = shapes.Limits(gemm=190e9, read=42e9)
    assert slow_memory.attention_s(decode, "float16") == pytest.approx(decode.kv_bytes("float16") / 42e9)
    slow_products = shapes.Limits(gemm=1e9, read=42e9)
    assert slow_products.attention_s(decode, "float16") == pytest.approx(decode.flops / 1e9)


def test_limits_of_the_table_follow_from_its_machine(shapes):
    # The baselines' torch SDPA times over our arithmetic's limit give the table's limits: the two speak of the same thing.
    machine = shapes.Limits(gemm=190e9, read=42e9)
    assert 30.5e-3 / machine.attention_s(shapes.P1, "float32") == pytest.approx(shapes.figure("P1", "float32")[1], rel=0.03)
    assert 111e-3 / machine.attention_s(shapes.D2, "float16") == pytest.approx(shapes.figure("D2", "float16")[1], rel=0.03)
    assert 37.1e-3 / machine.attention_s(shapes.D3, "bfloat16") == pytest.approx(shapes.figure("D3", "bfloat16")[1], rel=0.03)


def test_product_limits(shapes):
    limits = shapes.Limits(gemm=190e9, read=42e9)
    assert limits.product_flops(1, 8192, 4096, "bfloat16") == pytest.approx(42e9, rel=1e-3)          # 1 operation a byte, at 2 bytes each
    assert limits.product_flops(1, 8192, 4096, "float32") == pytest.approx(21e9, rel=1e-3)
    assert limits.product_flops(512, 8192, 4096, "float32") == 190e9


def test_geometric_mean_and_exponent(shapes):
    assert shapes.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert shapes.exponent([1, 2, 4, 8], [3 * size**2 for size in (1, 2, 4, 8)]) == pytest.approx(2.0)


@pytest.mark.parametrize("name, dtype, just_enough, too_little", [
    ("P1", "float32", 1.51, 1.5),                      # above the best peer's figure
    ("P2", "float32", 1.3, 1.29),                      # where torch itself is best
    ("D3", "float32", 1.71, 1.70),                     # parity
    ("D1", "float16", 20.1, 20.0),
])
def test_over_figures(verdicts, name, dtype, just_enough, too_little):
    assert verdicts.over_figures(name, dtype, just_enough, limit=99.0).passed
    assert not verdicts.over_figures(name, dtype, too_little, limit=99.0).passed


def test_only_bandwidth_alone_is_forgiven_by_the_limit(verdicts):
    assert verdicts.over_figures("D3", "float32", 1.53, limit=1.6).passed
    assert not verdicts.over_figures("D3", "float32", 1.51, limit=1.6).passed
    assert not verdicts.over_figures("D2", "float32", 1.7, limit=1.6).passed


def test_over_peers_counts_torch_itself(verdicts):
    assert not verdicts.over_peers("P1", "bfloat16", 0.99, {}).passed
    assert verdicts.over_peers("P1", "bfloat16", 1.01, {}).passed
    beaten = verdicts.over_peers("P1", "bfloat16", 2.0, {"FlexAttention": 2.5, "ONNX Runtime GQA": 1.5})
    assert not beaten.passed and "FlexAttention" in beaten.text


def test_mean_prefill_and_decode_rules(shapes, verdicts):
    assert verdicts.mean_over("", [2.6, 2.6], [1.0, 4.0]).passed
    assert not verdicts.mean_over("", [2.5, 2.5], [1.0, 4.0]).passed
    gemm = 100e9
    for shape, share in ((shapes.P1, 0.65), (shapes.P3, 0.75)):
        assert verdicts.prefill("", "float32", shape, shape.flops / (share * 1.001 * gemm), gemm).passed
        assert not verdicts.prefill("", "float32", shape, shape.flops / (share * 0.999 * gemm), gemm).passed
    assert verdicts.decode("D1", "float16", shapes.D1, 9.0, 1.0) is None          # neither batch 8 nor as many KV heads
    for shape in (shapes.D2, shapes.D3):
        assert verdicts.decode("", "float16", shape, 1.5, 1.0).passed
        assert not verdicts.decode("", "float16", shape, 1.51, 1.0).passed


def test_product_growth_and_decoder_rules(verdicts):
    assert not verdicts.product(1, "float32", 0.84, 1.0).passed and verdicts.product(1, "float32", 0.85, 1.0).passed
    assert not verdicts.product(4, "float32", 0.74, 1.0).passed and verdicts.product(4, "float32", 0.75, 1.0).passed
    assert verdicts.growth("", 1.9, 2.0, 0.15).passed and not verdicts.growth("", 1.8, 2.0, 0.15).passed
    assert verdicts.decoder_decode(75.0, 100.0).passed and not verdicts.decoder_decode(74.0, 100.0).passed
    assert verdicts.decoder_prefill(400.0, 100.0).passed and not verdicts.decoder_prefill(399.0, 100.0).passed


def test_a_cell_that_was_not_timed_fails_with_the_reason(shapes):
    attention = importlib.import_module("cpu.attention")
    cell = attention.Cell("P1", "float16", {"sdpa": 0.01}, {"ours": "wrong: 3 of 4 differ"}, {}, shapes.Limits(1e11, 4e10))
    (line,) = cell.verdicts()
    assert not line.passed and "wrong: 3 of 4 differ" in line.text


def test_a_wrong_contender_is_found_and_not_timed(shapes, monkeypatch):
    peers = importlib.import_module("cpu.peers")
    shape = shapes.Shape(1, 4, 2, 5, 9, 16, causal=True)
    (ours,) = peers.contenders(shape, torch.float32, "reference", peers=False)
    assert ours.reason is None
    true = peers.hetero_attn.attention
    monkeypatch.setattr(peers.hetero_attn, "attention", lambda *args, **options: true(*args, **options) * 1.01)
    (ours,) = peers.contenders(shape, torch.float32, "reference", peers=False)
    assert ours.reason.startswith("wrong") and ours.call is None


def test_a_sum_in_half_precision_is_found():
    products = importlib.import_module("cpu.products")
    x, weight = torch.randn(4, 4096).bfloat16(), torch.randn(256, 4096).bfloat16()
    parts = [x[:, own].double() @ weight[:, own].double().T for own in (slice(0, 2048), slice(2048, None))]
    assert products.wrong(sum(parts).bfloat16(), x, weight) is None
    assert products.wrong(parts[0].bfloat16() + parts[1].bfloat16(), x, weight) is not None


def test_the_decoder_model_has_the_shape_it_says():
    model = importlib.import_module("cpu.model")
    parameters = sum(torch.Size(shape).numel() for shape in model.tensors(model.CONFIG).values())
    assert parameters == 1_235_814_400                  # Llama 3.2 1B's own count
