"""The conformance suite on every instruction set that this CPU has, the portable one included, and cases of the cpu kernels' own making.

The set that serves as `cpu` is in hetero_attn/testing already; here each is forced by name. Own cases: key ranges that are split, groups of
every size, head dimensions up to the bound, and tiles that end anywhere.
"""

from contextlib import ExitStack
from dataclasses import replace
from itertools import product

import hypothesis
import pytest
import torch
from hetero_attn_cpu import CpuBackend
from hetero_attn_cpu.instruction_sets import of_this_cpu

from hetero_attn import registry
from hetero_attn.backend import UnsupportedError
from hetero_attn.jit import compiler_reason
from hetero_attn.product import linear
from hetero_attn.testing.attention import check
from hetero_attn.testing.attention_cases import DTYPES, attention_cases, full_grid
from hetero_attn.testing.cases import AttentionCase
from hetero_attn.testing.test_attention_hypothesis import dense_cases, varlen_cases
from hetero_attn.testing.tolerances import mismatch

SETS = [each.name for each in of_this_cpu()]
BEST = SETS[0]
st = hypothesis.strategies


@pytest.fixture(scope="module", autouse=True)
def backends():
    """cpu-portable, cpu-avx2, ... for this module."""
    with ExitStack() as stack:
        for name in SETS:
            stack.enter_context(registry.register(f"cpu-{name}", lambda name=name: CpuBackend(name)))
        if compiler_reason():
            pytest.skip(compiler_reason())
        reasons = {name: registry.get(f"cpu-{name}").unavailable_reasons() for name in SETS}
        assert not any(reasons.values()), reasons
        yield


def check_on(case: AttentionCase, sets) -> None:
    """One reference serves all sets."""
    for name in sets:
        try:
            check(case, f"cpu-{name}")
        except UnsupportedError as objection:
            assert case.gradients or case.dtype == torch.float64, objection


def own_cases():
    for D, group in product((1, 24, 64, 100, 128, 256, 511, 512), (1, 4)):
        yield AttentionCase(f"head_dim-{D}", batch=1, q_len=3, kv_len=70, q_heads=group, kv_heads=1, head_dim=D, is_causal=True)
    yield AttentionCase("v_head_dim-512", batch=1, q_len=40, kv_len=70, head_dim=16, v_head_dim=512, is_causal=True)
    # two fp32 rows are read in pairs of blocks: a key that only one of them sees, at either end, and ranges that are split as well
    yield AttentionCase("paired-partly-seen", batch=1, q_len=2, kv_len=150, q_heads=1, kv_heads=1, window_size=(148, -1), poison="nan",
                        lse="always")
    yield AttentionCase("paired-causal", batch=1, q_len=2, kv_len=150, q_heads=1, kv_heads=1, is_causal=True, poison="nan", lse="always")
    yield AttentionCase("paired-split", batch=1, q_len=2, kv_len=1300, q_heads=1, kv_heads=1, is_causal=True, window_size=(900, -1),
                        lse="always")
    for group in (1, 2, 3, 5, 7, 8, 9, 16, 17, 71):
        for q_len in (1, 2, 9):
            yield AttentionCase(f"group-{group}-{q_len}", batch=2, q_len=q_len, kv_len=150, q_heads=group, kv_heads=1, head_dim=64)
    split = {"batch": 1, "q_heads": 4, "kv_heads": 1, "head_dim": 32, "lse": "always"}
    for kv_len in (511, 512, 513, 1025, 1600):
        yield AttentionCase(f"split-{kv_len}", q_len=1, kv_len=kv_len, **split)
        yield AttentionCase(f"split-causal-{kv_len}", q_len=2, kv_len=kv_len, is_causal=True, **split)
    features = {"window": {"window_size": (900, -1), "is_causal": True}, "bias": {"mask": "bias -inf", "mask_axes": "b11k"},
                "bool": {"mask": "empty rows"}, "min": {"mask": "bias min"}, "alibi": {"alibi": 1}, "sinks": {"sinks": torch.float32},
                "softcap": {"softcap": 3.0}, "poison": {"poison": "nan", "is_causal": True},
                "large": {"contents": "large values"}, "paged": {"sequences": ((1, 1300), (2, 5)), "page_size": 48}}
    for feature, options in features.items():
        yield AttentionCase(f"split-{feature}", q_len=2, kv_len=1200, **(split | options))
        if "sequences" not in options:
            yield AttentionCase(f"long-{feature}", q_len=20, kv_len=2500, **(split | options))
    yield AttentionCase("long-paged", sequences=((20, 2300), (130, 131)), page_size=16, is_causal=True, q_heads=2, kv_heads=1)
    for q_len in (31, 32, 33, 95, 97, 128, 129):
        yield AttentionCase(f"tiles-{q_len}", batch=1, q_len=q_len, kv_len=q_len + 70, q_heads=2, kv_heads=2, is_causal=True)


@pytest.mark.parametrize("case", [case for case in attention_cases(full=False) if case.dtype in DTYPES.values()], ids=lambda c: c.name)
def test_every_set_conforms(case):
    check_on(case, SETS[1:])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", list(own_cases()), ids=lambda c: c.name)
def test_own_cases(case, dtype):
    check_on(replace(case, dtype=dtype), SETS)


def fuzz(examples):
    return hypothesis.settings(max_examples=examples, deadline=None, derandomize=not full_grid(), database=None, print_blob=True,
                               suppress_health_check=list(hypothesis.HealthCheck))


@fuzz(5000 if full_grid() else 60)
@hypothesis.given(case=dense_cases())
def test_random_dense_calls(case):
    check_on(case, SETS)


@fuzz(5000 if full_grid() else 60)
@hypothesis.given(case=varlen_cases())
def test_random_varlen_calls(case):
    check_on(case, SETS)


@fuzz(1000 if full_grid() else 15)
@hypothesis.given(
    kv_len=st.integers(400, 2600), q_len=st.sampled_from((1, 1, 2, 3, 9)), head_dim=st.integers(1, 140), group=st.integers(1, 9),
    dtype=st.sampled_from(list(DTYPES.values())), left=st.sampled_from((-1, 700)), sinks=st.booleans(),
)
def test_random_split_calls(kv_len, q_len, head_dim, group, dtype, left, sinks):
    case = AttentionCase("split", dtype, batch=1, q_len=q_len, kv_len=kv_len, q_heads=group, kv_heads=1, head_dim=head_dim, is_causal=True,
                         window_size=(left, -1), sinks=torch.float32 if sinks else None)
    check_on(case, SETS)


@fuzz(1500 if full_grid() else 80)
@hypothesis.given(M=st.one_of(st.integers(1, 9), st.integers(10, 150)), N=st.integers(1, 200), K=st.integers(1, 600),
                  dtype=st.sampled_from(list(DTYPES.values())), bias=st.booleans(), sliced=st.booleans())
def test_random_products(M, N, K, dtype, bias, sliced):
    random = torch.Generator().manual_seed(M * N + K)
    x, weight, b = (torch.randn(size, generator=random).to(dtype) for size in ((M, K + 3), (N, K + 3), (N,)))
    x, weight = (x[:, 1 : K + 1], weight[:, 1 : K + 1]) if sliced else (x[:, :K].contiguous(), weight[:, :K].contiguous())
    b = b if bias else None
    want = linear(x.double(), weight.double(), None if b is None else b.double())
    for name in SETS:
        room = torch.full((M, N + 2), float("nan"), dtype=dtype)
        found = registry.get(f"cpu-{name}").linear(x, weight, b, room[:, 1:-1])
        complaint = mismatch(found, want, dtype, magnitude=K**0.5)
        assert complaint is None, f"{name}: {complaint}"
        assert room[:, 0].isnan().all() and room[:, -1].isnan().all(), f"{name} wrote outside its rows"
        assert torch.equal(registry.get(f"cpu-{name}").linear(x, weight, b), found), f"{name}: a second call gave other bits"
