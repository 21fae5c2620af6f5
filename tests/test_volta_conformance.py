"""The conformance suite on volta-emulated: the kernels as they are, executed on the CPU, with cases of their own making.

Quick: the reduced grid, every variant, split keys, pages and poison, in one order. HETERO_ATTN_FULL=1: the full grid, four schedule orders,
and AddressSanitizer (in a process of its own, which preloads it).
"""


import pytest
import torch
from native import needs_compiler
from volta_emulated import NAME, volta_emulated

from hetero_attn.testing.attention import check
from hetero_attn.testing.attention_cases import attention_cases, full_grid
from hetero_attn.testing.cases import AttentionCase

pytestmark = needs_compiler
FULL = full_grid()
full = pytest.mark.skipif(not FULL, reason="run by `make test-full` (HETERO_ATTN_FULL=1)")
GRID = [case for case in attention_cases() if case.dtype == torch.float16 and not case.gradients]


@pytest.fixture(scope="module", autouse=True)
def launcher():
    with volta_emulated() as launcher:
        yield launcher


def own_cases():
    """Every variant of the kernels, at lengths that cut tiles; splits; windows and masks across tile borders."""
    one = {"batch": 1, "kv_heads": 1, "dtype": torch.float16}
    for D in (32, 64, 96, 128, 192, 256, 250):
        yield AttentionCase(f"prefill-{D}", q_len=70, kv_len=101, q_heads=1, head_dim=D, is_causal=True, lse="always", **one)
        yield AttentionCase(f"decode-{D}", q_len=1, kv_len=290, q_heads=6, head_dim=D, lse="always", **one)
    yield AttentionCase("wide", q_len=33, kv_len=35, q_heads=2, head_dim=64, v_head_dim=200, is_causal=True, **one)
    yield AttentionCase("many-rows", q_len=4, kv_len=300, q_heads=8, head_dim=64, is_causal=True, **one)
    features = {"causal": {"is_causal": True}, "window": {"window_size": (300, 4)},
                "bias": {"mask": "bias -inf"}, "bool": {"mask": "empty rows"},
                "alibi": {"alibi": 1}, "sinks": {"sinks": torch.float32}, "softcap": {"softcap": 3.0}, "min": {"mask": "bias min"},
                "poison": {"poison": "nan", "is_causal": True}, "inf": {"poison": "inf", "is_causal": True}}
    for name, options in features.items():
        yield AttentionCase(f"split-{name}", q_len=2, kv_len=600, q_heads=2, head_dim=32, **(one | options))
        yield AttentionCase(f"long-{name}", q_len=36, kv_len=170, q_heads=1, head_dim=32, **(one | options))
    split = {"is_causal": True, "sinks": torch.float32, "lse": "always"}
    yield AttentionCase("split-prefill", q_len=40, kv_len=1100, q_heads=1, head_dim=32, **(one | split))
    paged = {"page_size": 48, "q_heads": 2, "kv_heads": 1, "head_dim": 64, "dtype": torch.float16}
    yield AttentionCase("split-pages", sequences=((1, 700), (2, 5), (0, 9)), **paged)
    yield AttentionCase("prefill-pages", sequences=((33, 130), (2, 5), (40, 40)), is_causal=True, **paged)


@pytest.mark.parametrize("case", GRID, ids=lambda case: case.name)
def test_conforms(case):
    check(case, NAME)


@pytest.mark.parametrize("case", list(own_cases()), ids=lambda case: case.name)
def test_own_cases(case):
    check(case, NAME)
