"""The Triton backend's planning on any machine: tiles fit, splits fill a device; and the backend's words where there is no GPU."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hetero_attn_triton import TritonBackend
from hetero_attn_triton.launching import DoesNotCompile, told_apart, triton_reasons
from hetero_attn_triton.tiling import (
    DECODE_HALF,
    MAX_HEAD_DIM,
    PREFILL_HALF,
    REGISTERS,
    Demand,
    Device,
    Tile,
    candidates,
    fits,
    folded,
    padded,
    plan,
    shape_class,
    splits_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_attn import registry
from hetero_attn.profile import load_profile
from hetero_attn.spec import AttentionSpec, Operands

H100, A100, CONSUMER, AMD = Device(132, 232448, True), Device(108, 166912), Device(128, 101376), Device(304, 65536)
DEVICES = {"h100": H100, "a100": A100, "consumer": CONSUMER, "amd": AMD}
PREFILL = AttentionSpec("cuda", torch.bfloat16, 2, 32, 8, 4096, 4096, 128, 128, is_causal=True, scale=0.088)
DECODE = replace(PREFILL, q_len=1)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@given(dim=st.integers(1, 256), v_dim=st.integers(1, 256), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
       q_len=st.sampled_from([0, 1, 2, 7, 64, 100, 5000]), kv_len=st.sampled_from([0, 1, 100, 100_000]),
       batch=st.sampled_from([0, 1, 70_000]),
       heads=st.sampled_from([(1, 1), (8, 1), (32, 8), (40, 40)]), left=st.sampled_from([-1, 0, 300]), causal=st.booleans(),
       mask=st.sampled_from([None, None, torch.bool, torch.float64]))
@settings(max_examples=150, deadline=None)
def test_every_call_has_a_plan_that_fits(device, dim, v_dim, dtype, q_len, kv_len, batch, heads, left, causal, mask):
    spec = AttentionSpec("cuda", dtype, batch, *heads, q_len, kv_len, dim, v_dim, is_causal=causal, window_size=(left, -1), mask=mask)
    made = plan(spec, device)
    assert fits(made.tile, Demand.of(spec), device) and made.shared_bytes <= device.shared_memory_bytes
    assert made.heads in (1, spec.group_size) and made.tiles * made.tile.rows >= q_len * made.heads
    assert 1 <= made.splits <= 128 and made.programs == made.tiles * made.splits * batch * heads[0] // made.heads
    assert made.programs < 1 << 31
    if made.splits > 1:
        assert kv_len >= 4 * made.splits * made.tile.keys - made.tile.keys
    assert str(made) and made.to_dict()["shared_bytes"] == made.shared_bytes


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_prefill_takes_the_tallest_tile_that_fits(device):
    made = plan(PREFILL, device)
    assert made.tile == candidates(PREFILL, device)[0] and made.heads == 1 and made.splits == 1
    assert made.tile.rows == 128 and not any(tile.rows > 128 for tile in PREFILL_HALF)


def test_known_plans():
    """What the devices of the profiles get: changes here are changes of speed."""
    assert plan(PREFILL, H100).tile == Tile(128, 128, 8, 3)
    assert plan(replace(PREFILL, head_dim=64, v_head_dim=64), H100).tile == Tile(128, 128, 8, 3)
    assert plan(replace(PREFILL, head_dim=256, v_head_dim=256), H100).tile == Tile(128, 64, 8, 2)
    assert plan(PREFILL, A100).tile == Tile(128, 64, 8, 3)
    assert plan(PREFILL, CONSUMER).tile == Tile(128, 64, 8, 2)
    assert plan(DECODE, H100).tile == Tile(16, 64, 4, 3)


def test_decode_folds_a_group_and_fills_the_device():
    made = plan(DECODE, H100)
    assert made.heads == 4 and made.tiles == 1 and made.tile.rows == 16
    assert 2 * 8 * made.splits == made.programs and made.programs >= H100.units // 2
    assert plan(replace(DECODE, batch=512), H100).splits == 1
    assert plan(replace(DECODE, kv_len=128), H100).splits == 1
    assert not folded(replace(PREFILL, q_len=17)) and folded(replace(PREFILL, q_len=16)) and folded(replace(DECODE, dtype=torch.float32))


def test_large_groups_are_folded_into_several_tiles():
    shared_key = replace(DECODE, q_heads=71, kv_heads=1, head_dim=64, v_head_dim=64)
    made = plan(shared_key, H100)
    assert made.heads == 71 and made.tile.rows == 64 and made.tiles == 2 and made.programs == 2 * 2 * made.splits
    assert folded(replace(PREFILL, q_len=5, q_heads=128)) and not folded(replace(PREFILL, q_len=200, kv_heads=32))
    assert not folded(replace(PREFILL, q_len=17, kv_heads=4))


@given(programs=st.integers(1, 600), blocks=st.integers(1, 5000), slots=st.integers(1, 600))
def test_splits_keep_the_device_busy(programs, blocks, slots):
    """By counting waves and what each works: within a tenth of the best, and no more splits than that takes."""
    def work(splits):
        share = -(-blocks // splits)
        return -(-programs * -(-blocks // share) // slots) * share

    splits, most = splits_of(programs, blocks, slots), max(1, min(blocks // 4, 128))
    assert 1 <= splits <= most and (splits == 1 or programs < slots)
    if programs < slots:
        best = min(map(work, range(1, most + 1)))
        assert 0.9 * work(splits) <= best + 1e-9 and all(0.9 * work(fewer) > best - 1e-9 for fewer in range(1, splits))


def test_splits_of_known_decode_steps():
    assert splits_of(40, 64, 108) == 13 or 40 * splits_of(40, 64, 108) > 0.8 * 108
    assert splits_of(72, 128, 132) >= 3              # a floor of 132 // 72 would leave half the device idle


def test_blackwell_gets_short_tiles():
    """Triton 3.6 fails to compile products of 64 rows for compute capability 10.0."""
    blackwell = Device(148, 232448, most_rows=32)
    assert plan(PREFILL, blackwell).tile.rows == 32 and plan(replace(DECODE, q_heads=128), blackwell).tile.rows == 16
    assert plan(replace(DECODE, q_heads=512), blackwell).tile.rows == 32
    assert plan(PREFILL, blackwell, {shape_class(PREFILL): Tile(128, 64, 8, 2)}).tile.rows == 32


def test_single_precision_takes_tiles_that_do_not_spill():
    assert plan(replace(PREFILL, dtype=torch.float32), CONSUMER).tile == Tile(16, 32, 8, 1)


class Refuses:
    """A launcher whose compiler fails on tiles of more rows than `rows`, as `error`."""

    device, probes, tried = "cuda", False, None

    def __init__(self, rows, error):
        self.rows, self.error, self.tried = rows, error, []

    def unavailable_reasons(self, index=None):
        return []

    def hardware(self, device):
        return A100

    def tuned(self, device):
        return {}

    def launch(self, kernel, programs, arguments, constants, *rest, **options):
        if kernel == "combine":
            return
        self.tried.append(constants["BLOCK_M"])
        if constants["BLOCK_M"] > self.rows:
            raise told_apart(self.error)


OUT_OF_RESOURCES = type("OutOfResources", (Exception,), {})("out of resource: shared memory")
SMALL = replace(PREFILL, batch=1, q_heads=1, kv_heads=1, q_len=300, kv_len=300, device="cpu")


def call(backend):
    x = torch.zeros(1, 1, 300, 128, dtype=torch.bfloat16)
    return backend.attention(x, x, x, SMALL, Operands())


def test_a_tile_that_is_too_large_gives_way():
    launcher = Refuses(32, OUT_OF_RESOURCES)
    backend = TritonBackend(launcher)
    call(backend)
    assert launcher.tried[0] == 128 and launcher.tried[-1] == 32 and len(launcher.tried) > 2
    count = len(launcher.tried)
    call(backend)
    assert launcher.tried[count:] == [32] and backend.unsupported_reasons(replace(SMALL, device="cuda")) == []


@pytest.mark.parametrize("error", [OUT_OF_RESOURCES, RuntimeError("PassManager::run failed")], ids=["too large", "does not compile"])
def test_what_does_not_compile_is_objected_to_from_then_on(error):
    backend, before = TritonBackend(Refuses(0, error)), registry.choice(None)
    with pytest.raises(DoesNotCompile):
        call(backend)
    reasons = backend.unsupported_reasons(replace(SMALL, device="cuda"))
    assert len(reasons) == 1 and "Triton did not compile this kind of call here" in reasons[0] and registry.choice(None) != before
    assert backend.unsupported_reasons(replace(SMALL, device="cuda", head_dim=64)) == []


def test_errors_of_the_device_are_no_errors_of_the_compiler():
    error = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    assert told_apart(error) is error


def test_a_window_bounds_the_splits():
    near = replace(DECODE, kv_len=100_000, window_size=(255, 0))
    assert plan(near, H100).splits == 1 and plan(replace(near, window_size=(-1, -1)), H100).splits > 8


def test_a_short_prompt_takes_a_short_tile():
    assert plan(replace(PREFILL, q_len=33, kv_heads=32), H100).tile.rows == 64
    assert plan(replace(PREFILL, q_len=128), H100).tile.rows == 128


def test_a_tuned_tile_is_taken_where_it_fits():
    tile = Tile(64, 32, 4, 2)
    assert plan(PREFILL, H100, {shape_class(PREFILL): tile}).tile == tile
    assert plan(PREFILL, H100, {shape_class(DECODE): tile}).tile == plan(PREFILL, H100).tile
    assert plan(DECODE, H100, {shape_class(DECODE): Tile(0, 32, 2, 2)}).tile == Tile(16, 32, 2, 2)
    assert plan(PREFILL, AMD, {shape_class(PREFILL): Tile(128, 128, 8, 3)}).tile == plan(PREFILL, AMD).tile


def test_classes():
    assert shape_class(PREFILL) == "prefill-d128-v128-half" and shape_class(DECODE) == "decode-d128-v128-half"
    assert shape_class(replace(PREFILL, head_dim=80, v_head_dim=40, dtype=torch.float32)) == "prefill-d128-v64-single"


def test_registers_tell_ampere_from_hopper():
    """128 x 128 at 128 features: compiled for sm_80 it spills, for sm_90 it does not (test_triton_compiled.py)."""
    tile = Tile(128, 128, 8, 2)
    assert tile.registers(128, 128, 2, True) <= REGISTERS < tile.registers(128, 128, 2, False)
    assert all(tile.registers(32, 32, 2, True) <= REGISTERS for tile in PREFILL_HALF) and all(tile.rows == 0 for tile in DECODE_HALF)


def test_profiles_give_the_device():
    assert Device.of(load_profile("h100").hardware) == H100
    assert Device.of(load_profile("cuda").hardware).shared_memory_bytes == 101376


def test_beyond_the_kernel():
    with pytest.raises(ValueError, match="head_dim is 257, the kernel has 1 to 256"):
        padded(MAX_HEAD_DIM + 1)
    with pytest.raises(ValueError, match=r"B of shared memory .*, the device has 1024 B"):
        candidates(PREFILL, Device(1, 1024))


@pytest.mark.parametrize(("changes", "words"), [
    ({"device": "cpu"}, "device is cpu, these kernels run on cuda; move the tensors there"),
    ({"dtype": torch.float64}, "dtype is float64, kernel has float16, bfloat16, float32; cast to float32"),
    ({"head_dim": 300}, "head_dim is 300, kernel has up to 256; use backend 'sdpa'"),
    ({"v_head_dim": 257}, "v_head_dim is 257, kernel has up to 256; use backend 'sdpa'"),
    ({"needs_grad": True}, "gradients are needed, kernel has no backward; use backend 'sdpa', or torch.no_grad() if they are not"),
])
def test_objections(changes, words):
    assert TritonBackend().unsupported_reasons(PREFILL) == []
    assert TritonBackend().unsupported_reasons(replace(PREFILL, **changes)) == [words]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_why_and_imports_no_triton():
    program = ("import sys; from hetero_attn import registry; print(registry.get('triton').unavailable_reasons()); "
               "print('triton' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    reasons, loaded = done.stdout.splitlines()
    assert "install a build of torch for your GPU" in reasons or "torch sees no GPU" in reasons
    assert loaded == "False"


def test_triton_is_missing_or_old(monkeypatch):
    assert triton_reasons(lambda name: None) == ["triton is not installed; pip install 'hetero-attn[triton]' (triton)"]
    import types
    for version, words in (("3.3.1", "triton is 3.3.1, the kernels need 3.4 or later"), ("nightly", "says that its version is nightly")):
        monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
        assert words in triton_reasons(lambda name: True)[0]
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.6.0"))
    assert triton_reasons(lambda name: True) == []


def test_explain_shows_the_tiling():
    report = TritonBackend().tiling(PREFILL, load_profile("h100"))
    assert str(report) == "triton 128 rows x 128 keys, 8 warps, 3 stages: 2048 programs, 231424 B shared"
