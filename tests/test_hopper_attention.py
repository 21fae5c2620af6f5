"""hopper's attention without a GPU: what it says of calls, and the conformance cases with torch's kernels replaced by their documents'
meaning."""

from dataclasses import replace
from types import SimpleNamespace

import hopper_flash_attn
import pytest
import torch
from hetero_attn_hopper import HopperBackend
from hetero_attn_hopper.flash_attn import FlashAttnPackage
from hetero_attn_hopper.operators import TorchOperators
from hopper_operators import ReferenceOperators

import hetero_attn
from hetero_attn import registry
from hetero_attn.backend import UnsupportedError
from hetero_attn.profile import load_profile
from hetero_attn.spec import AttentionSpec
from hetero_attn.testing.attention import check
from hetero_attn.testing.attention_cases import attention_cases, full_grid
from hetero_attn.testing.cases import AttentionCase

NAME, WITH_PACKAGE = "hopper-emulated", "hopper-emulated-flash-attn"
HALVES = (torch.float16, torch.bfloat16)
GRID = [case for case in attention_cases() if case.dtype in HALVES and not case.gradients]
CASES = GRID if full_grid() else GRID[::6]
BASE = AttentionSpec("cuda", torch.bfloat16, 2, 32, 8, 512, 512, 128, 128, is_causal=True, scale=0.1)
VARLEN = {"varlen": True, "total_q": 700}
RUNS = {
    "causal": {}, "fp16": {"dtype": torch.float16}, "decode": {"q_len": 1}, "chunk": {"q_len": 100}, "window": {"window_size": (63, 0)},
    "sinks": {"sinks": True}, "lse": {"return_lse": True}, "packed": VARLEN,
    "head 72": {"head_dim": 72, "v_head_dim": 72},
}
PACKAGE_RUNS = {
    "softcap": {"softcap": 30.0}, "alibi": {"alibi": 1}, "softcap's lse": {"softcap": 30.0, "return_lse": True, "sinks": True},
    "decode on pages": VARLEN | {"q_len": 1, "page_size": 256},
}
OBJECTIONS = {
    "fp32": ({"dtype": torch.float32}, "dtype is float32, the kernels have float16 and bfloat16; cast"),
    "gradients": ({"needs_grad": True}, "this backend serves inference"),
    "cpu": ({"device": "cpu"}, "device is cpu, torch's cuDNN and FlashAttention kernels run on cuda"),
    "wide": ({"head_dim": 320, "v_head_dim": 320}, "head_dim is 320, FlashAttention takes multiples of 8 up to 256"),
    "odd": ({"head_dim": 100, "v_head_dim": 100}, "head_dim is 100, FlashAttention takes multiples of 8"),
    "Dv": ({"v_head_dim": 64}, "v_head_dim is 64, FlashAttention wants head_dim's 128"),
    "softcap": ({"softcap": 30.0}, "softcap is 30, torch's kernels have none; install flash-attn 2.6.3 or later, below 3, or"),
    "alibi": ({"alibi": 1}, "alibi: torch's FlashAttention is built without it; install flash-attn 2.6.3 or later"),
    "alibi and lse": ({"alibi": 1, "return_lse": True}, "flash-attn's is shifted by row in causal calls"),
    "alibi and sinks": ({"alibi": 1, "sinks": True}, "sinks need the lse"),
    "pages": (VARLEN | {"q_len": 1, "page_size": 256},
              "pages: torch's FlashAttention writes wrong rows when it decodes on them (pytorch#194167)"),
    "mask": ({"mask": torch.bool, "is_causal": False}, "attn_mask is bool"),
    "scale": ({"scale": -1.0}, "scale is -1, the kernels want it positive"),
    "small pages": (VARLEN | {"q_len": 1, "page_size": 64}, "pages hold 64 tokens, flash-attn takes multiples of 256"),
    "prefill on pages": (VARLEN | {"page_size": 256}, "only decoding a token at a time without a window goes on pages"),
}


@pytest.fixture(scope="module")
def operators():
    operators = ReferenceOperators()
    with registry.register(NAME, lambda: HopperBackend(operators)):
        yield operators


@pytest.fixture(scope="module")
def package():
    """hopper with the stand-in for flash-attn -> its calls."""
    with registry.register(WITH_PACKAGE, lambda: HopperBackend(ReferenceOperators(), packages=[FlashAttnPackage("hopper_flash_attn")])):
        yield hopper_flash_attn.CALLS


ABSENT = FlashAttnPackage("no_flash_attn_here")


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_runs(options):
    assert HopperBackend(packages=[ABSENT]).unsupported_reasons(replace(BASE, **options)) == []


@pytest.mark.parametrize("options", PACKAGE_RUNS.values(), ids=PACKAGE_RUNS)
def test_runs_with_the_package(options):
    spec, backend = replace(BASE, **options), HopperBackend(packages=[FlashAttnPackage("hopper_flash_attn")])
    assert backend.unsupported_reasons(spec) == [] and any("flash-attn" in remark for remark in backend.remarks(spec))


@pytest.mark.parametrize("options, words", OBJECTIONS.values(), ids=OBJECTIONS)
def test_objects(options, words):
    reasons = HopperBackend(packages=[ABSENT]).unsupported_reasons(replace(BASE, **options))
    assert any(words in reason for reason in reasons), reasons


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_install():
    reasons = HopperBackend().unavailable_reasons()
    assert len(reasons) == 1 and ("has no CUDA; install a CUDA build of torch" in reasons[0] or "sees no CUDA device" in reasons[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conforms(operators, case):
    try:
        check(case, NAME)
    except UnsupportedError as objection:
        pytest.skip("; ".join(objection.reasons.get(NAME, [])) or str(objection))


def own_cases():
    """What only FlashAttention's meaning carries: unlike lengths, windows and sinks in packed sequences, poison."""
    one = {"dtype": torch.bfloat16, "q_heads": 4, "kv_heads": 2, "head_dim": 16, "lse": "always"}
    packed = {"sequences": ((5, 9), (0, 4), (7, 7), (3, 0), (6, 2)), **one}
    features = {"plain": {}, "causal": {"is_causal": True}, "window": {"window_size": (3, 1)},
                "both": {"is_causal": True, "window_size": (3, -1)},
                "sinks": {"sinks": torch.float32, "is_causal": True}, "poison": {"poison": "nan", "is_causal": True},
                "inf": {"poison": "inf", "window_size": (2, 0)}}
    for name, options in features.items():
        yield AttentionCase(f"dense-{name}", batch=2, q_len=6, kv_len=9, **one, **options)
        yield AttentionCase(f"longer-{name}", batch=2, q_len=9, kv_len=6, **one, **options)
        yield AttentionCase(f"square-{name}", batch=2, q_len=7, kv_len=7, **one, **options)
        yield AttentionCase(f"packed-{name}", **packed, **options)
    yield AttentionCase("empty-among-single-queries", sequences=((1, 3), (0, 2), (1, 4)), **one)


@pytest.mark.parametrize("case", list(own_cases()), ids=lambda case: case.name)
def test_own_cases(operators, case):
    check(case, NAME)


def package_cases():
    """What only the package expresses."""
    one = {"dtype": torch.bfloat16, "q_heads": 4, "kv_heads": 2, "head_dim": 16}
    features = {"cap": {"softcap": 2.0, "lse": "always"},
                "cap-sinks": {"softcap": 2.0, "sinks": torch.float32, "is_causal": True, "lse": "always"},
                "alibi": {"alibi": 1, "is_causal": True, "lse": "never"}, "slopes": {"alibi": 2, "lse": "never"},
                "alibi-window": {"alibi": 1, "window_size": (3, 1), "lse": "never"},
                "alibi-cap": {"alibi": 1, "softcap": 2.0, "is_causal": True, "poison": "nan", "lse": "never"}}
    for name, options in features.items():
        yield AttentionCase(f"dense-{name}", batch=2, q_len=6, kv_len=9, **one, **options)
        yield AttentionCase(f"packed-{name}", sequences=((5, 9), (0, 4), (7, 7), (3, 0), (6, 2)), **one, **options)
    yield AttentionCase("pages", sequences=((1, 300), (1, 5), (1, 512)), page_size=256, lse="always", **one)
    yield AttentionCase("pages-empty", sequences=((1, 300), (0, 5), (1, 3)), page_size=256, lse="always", **one)
    yield AttentionCase("pages-sinks", sequences=((1, 300), (1, 0)), page_size=512, sinks=torch.float32, lse="always", **one)


@pytest.mark.parametrize("case", list(package_cases()), ids=lambda case: case.name)
def test_cases_of_the_package(package, case):
    before = len(package)
    check(case, WITH_PACKAGE)
    assert len(package) > before


def test_what_torch_has_is_left_to_torch(package):
    before = len(package)
    check(AttentionCase("plain", dtype=torch.bfloat16, batch=1, q_len=6, kv_len=9, q_heads=4, kv_heads=2, head_dim=16, is_causal=True,
                        lse="always"), WITH_PACKAGE)
    assert len(package) == before


@pytest.mark.parametrize("version, names, words", [
    ("2.5.8", ("flash_attn_func", "flash_attn_varlen_func"), "flash-attn is 2.5.8, install flash-attn 2.6.3 or later, below 3"),
    ("3.0.0", ("flash_attn_func", "flash_attn_varlen_func"), "flash-attn is 3.0.0, install"),
    ("2.8.3", ("flash_attn_func",), "flash-attn is 2.8.3, install"), ("2.7.4.post1", ("flash_attn_func", "flash_attn_varlen_func"), ""),
])
def test_which_packages_serve(monkeypatch, version, names, words):
    module = SimpleNamespace(__version__=version, **dict.fromkeys(names, len))
    monkeypatch.setattr("importlib.import_module", lambda name: module)
    reasons = FlashAttnPackage().reasons()
    assert reasons == [] if not words else words in reasons[0]


def test_a_package_that_does_not_import_is_no_crash(monkeypatch):
    def broken(name):
        raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c10\nmore")

    monkeypatch.setattr("importlib.import_module", broken)
    assert FlashAttnPackage().reasons() == ["flash-attn does not import (ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c10); "
                                            "build it for this torch"]


def test_features_that_are_apart_in_memory(operators):
    q, k, v = (torch.randn(1, 2, 16, 8).bfloat16().transpose(-1, -2) for _ in range(3))
    before = operators.calls["dense"]
    for is_causal in (False, True):
        want = hetero_attn.attention(q, k, v, is_causal=is_causal, backend="sdpa")
        found = hetero_attn.attention(q, k, v, is_causal=is_causal, backend=NAME)
        assert (found.float() - want.float()).abs().max() < 0.02
    assert operators.calls["dense"] == before + 2


def test_a_row_that_sees_nan_in_a_key_has_an_lse_of_nan(operators):
    q, k, v = (torch.randn(1, 2, 4, 8).bfloat16() for _ in range(3))
    k[:, :, 2] = float("nan")
    out, lse = hetero_attn.attention(q, k, v, is_causal=True, return_lse=True, backend=NAME)
    for found in (out[..., 0], lse):
        assert found.isnan().tolist() == [[[False, False, True, True]] * 2]


def test_the_probe_finds_kernels_that_let_nan_of_an_unseen_key_through():
    class Leaking(ReferenceOperators, TorchOperators):
        device = "cpu"

        def dense(self, q, k, v, is_causal, scale):
            return super().dense(q, k, v, is_causal, scale) + 0 * k.sum()

    class Clean(ReferenceOperators, TorchOperators):
        device = "cpu"

    assert Clean().probe() == []
    assert "NaN in a key they do not see has reached" in Leaking().probe()[0]


def test_each_kernel_serves_what_is_its_own(operators):
    before = dict(operators.calls)
    square = {"batch": 1, "q_len": 8, "kv_len": 8, "q_heads": 2, "kv_heads": 2, "head_dim": 8}
    check(AttentionCase("square", torch.float16, is_causal=True, lse="never", **square), NAME)
    assert operators.calls["dense"] > before["dense"] and operators.calls["flash"] == before["flash"]


def test_profiles_of_hopper_cards_list_it_and_end_in_sdpa():
    for name in ("h100", "h200"):
        profile = load_profile(name)
        assert profile.backends[0] == "hopper" and profile.backends[-1] == "sdpa" and profile.communicators[0] == "hopper"
        assert profile.communicators[-1] == "distributed" and profile.verified == "none" and "hopper" not in profile.awaits
