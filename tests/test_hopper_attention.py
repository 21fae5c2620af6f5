"""hopper's attention without a GPU: what it says of calls, and the conformance cases with torch's kernels replaced by their documents'
meaning."""

from dataclasses import replace

import pytest
import torch
from hetero_attn_hopper import HopperBackend
from hopper_operators import ReferenceOperators

from hetero_attn import registry
from hetero_attn.backend import UnsupportedError
from hetero_attn.profile import load_profile
from hetero_attn.spec import AttentionSpec
from hetero_attn.testing.attention import check
from hetero_attn.testing.attention_cases import attention_cases, full_grid
from hetero_attn.testing.cases import AttentionCase

NAME = "hopper-emulated"
HALVES = (torch.float16, torch.bfloat16)
GRID = [case for case in attention_cases() if case.dtype in HALVES and not case.gradients]
CASES = GRID if full_grid() else GRID[::6]
BASE = AttentionSpec("cuda", torch.bfloat16, 2, 32, 8, 512, 512, 128, 128, is_causal=True, scale=0.1)
VARLEN = {"varlen": True, "total_q": 700}
RUNS = {
    "causal": {}, "fp16": {"dtype": torch.float16}, "decode": {"q_len": 1}, "chunk": {"q_len": 100}, "window": {"window_size": (63, 0)},
    "alibi": {"alibi": 1}, "sinks": {"sinks": True}, "lse": {"return_lse": True}, "packed": VARLEN,
    "head 72": {"head_dim": 72, "v_head_dim": 72},
    "decode on pages": VARLEN | {"q_len": 1, "page_size": 256},
}
OBJECTIONS = {
    "fp32": ({"dtype": torch.float32}, "dtype is float32, the kernels have float16 and bfloat16; cast"),
    "gradients": ({"needs_grad": True}, "this backend serves inference"),
    "cpu": ({"device": "cpu"}, "device is cpu, torch's cuDNN and FlashAttention kernels run on cuda"),
    "wide": ({"head_dim": 320, "v_head_dim": 320}, "head_dim is 320, FlashAttention takes multiples of 8 up to 256"),
    "odd": ({"head_dim": 100, "v_head_dim": 100}, "head_dim is 100, FlashAttention takes multiples of 8"),
    "Dv": ({"v_head_dim": 64}, "v_head_dim is 64, FlashAttention wants head_dim's 128"),
    "softcap": ({"softcap": 30.0}, "softcap is 30, torch's kernels have none"),
    "mask": ({"mask": torch.bool, "is_causal": False}, "attn_mask is bool"),
    "scale": ({"scale": -1.0}, "scale is -1, the kernels want it positive"),
    "small pages": (VARLEN | {"q_len": 1, "page_size": 64}, "pages hold 64 tokens, FlashAttention takes multiples of 256"),
    "prefill on pages": (VARLEN | {"page_size": 256}, "only decoding a token at a time without a window goes on pages"),
}


@pytest.fixture(scope="module")
def operators():
    operators = ReferenceOperators()
    with registry.register(NAME, lambda: HopperBackend(operators)):
        yield operators


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_runs(options):
    assert HopperBackend().unsupported_reasons(replace(BASE, **options)) == []


@pytest.mark.parametrize("options, words", OBJECTIONS.values(), ids=OBJECTIONS)
def test_objects(options, words):
    reasons = HopperBackend().unsupported_reasons(replace(BASE, **options))
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
    """What only FlashAttention's meaning carries: unlike lengths, windows, alibi and sinks in packed sequences, poison, pages."""
    one = {"dtype": torch.bfloat16, "q_heads": 4, "kv_heads": 2, "head_dim": 16, "lse": "always"}
    packed = {"sequences": ((5, 9), (0, 4), (7, 7), (3, 0), (6, 2)), **one}
    features = {"plain": {}, "causal": {"is_causal": True}, "window": {"window_size": (3, 1)},
                "both": {"is_causal": True, "window_size": (3, -1)}, "alibi": {"alibi": 1, "is_causal": True}, "slopes": {"alibi": 2},
                "sinks": {"sinks": torch.float32, "is_causal": True}, "poison": {"poison": "nan", "is_causal": True},
                "inf": {"poison": "inf", "window_size": (2, 0)}}
    for name, options in features.items():
        yield AttentionCase(f"dense-{name}", batch=2, q_len=6, kv_len=9, **one, **options)
        yield AttentionCase(f"longer-{name}", batch=2, q_len=9, kv_len=6, **one, **options)
        yield AttentionCase(f"packed-{name}", **packed, **options)
    yield AttentionCase("pages", sequences=((1, 300), (1, 5), (1, 512)), page_size=256, **one)
    yield AttentionCase("pages-sinks", sequences=((1, 300), (1, 0)), page_size=512, sinks=torch.float32, **one)


@pytest.mark.parametrize("case", list(own_cases()), ids=lambda case: case.name)
def test_own_cases(operators, case):
    check(case, NAME)


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
