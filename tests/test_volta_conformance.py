"""The conformance suite on volta-emulated: the kernels as they are, executed on the CPU, with cases of their own making.

Quick: the reduced grid, every variant, split keys, pages and poison, in one order. HETERO_ATTN_FULL=1: the full grid, four schedule orders,
and AddressSanitizer (in a process of its own, which preloads it).
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import ceil

import hypothesis
import pytest
import torch
from hetero_attn_volta.kernels import sources
from hetero_attn_volta.tiling import FORWARD, Plan
from native import needs_compiler
from volta_emulated import NAME, volta_emulated

from hetero_attn import registry
from hetero_attn.compiler import find_compiler
from hetero_attn.profile import load_profile, shipped_profiles
from hetero_attn.testing.attention import check
from hetero_attn.testing.attention_cases import attention_cases, full_grid
from hetero_attn.testing.cases import AttentionCase
from hetero_attn.testing.simt import ORDERS, SimtLauncher
from hetero_attn.testing.test_attention_hypothesis import dense_cases, varlen_cases

pytestmark = needs_compiler
FULL = full_grid()
full = pytest.mark.skipif(not FULL, reason="run by `make test-full` (HETERO_ATTN_FULL=1)")
SANITIZED = os.environ.get("SIMT_SANITIZE") == "1"        # this process was started by test_under_address_sanitizer
GRID = [case for case in attention_cases() if case.dtype == torch.float16 and not case.gradients]
REDUCED = [case for case in attention_cases(full=False) if case.dtype == torch.float16 and not case.gradients]


@pytest.fixture(scope="module", autouse=True)
def launcher():
    with volta_emulated(SimtLauncher(sanitize=SANITIZED)) as launcher:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda source: launcher.program(source).kernel.build(), sources()))
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


OWN = list(own_cases())
OTHER_ORDERS = [case for case in OWN if FULL or case.name in ("prefill-64", "decode-64", "split-causal", "long-poison", "prefill-pages")]


@pytest.mark.parametrize("case", GRID, ids=lambda case: case.name)
def test_conforms(case):
    check(case, NAME)


@pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
def test_own_cases(case):
    check(case, NAME)


# What the plan takes only where a call fills the device: forced on calls that a processor can run.
LARGE = [variant for variant in FORWARD if next(each for each in FORWARD if each.head_dim == variant.head_dim) != variant]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("variant", LARGE, ids=lambda variant: variant.name)
def test_variants_for_large_calls(variant, splits, monkeypatch):
    """Rows that end within the second block, masks of all kinds, values that are not finite, pages, and keys in splits."""
    forced = lambda spec: Plan(variant, (ceil(spec.q_len / variant.queries) * splits, spec.q_heads, spec.batch), splits)
    monkeypatch.setattr(registry.get(NAME), "plan", forced)
    q_len, kv_len = variant.queries + 21, variant.queries + 50
    options = {"poison": {"poison": "nan", "is_causal": True}, "window": {"window_size": (75, 4), "sinks": torch.float32}}
    if splits == 1:
        options |= {"bias": {"mask": "bias -inf"}, "softcap": {"softcap": 3.0, "alibi": 1, "is_causal": True}}
    for name, each in options.items():
        check(AttentionCase(f"large-{name}", batch=1, q_len=q_len, kv_len=kv_len, q_heads=1, kv_heads=1, head_dim=variant.head_dim,
                            dtype=torch.float16, lse="always", **each), NAME)
    check(AttentionCase("large-pages", sequences=((q_len, kv_len), (33, 90)), is_causal=True, page_size=48, q_heads=1, kv_heads=1,
                        head_dim=variant.head_dim, dtype=torch.float16), NAME)


@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("case", [*OTHER_ORDERS, *(REDUCED if FULL else ())], ids=lambda case: case.name)
def test_in_other_orders_of_threads(launcher, case, order):
    launcher.order = order
    try:
        check(case, NAME)
    finally:
        launcher.order = 0


def fuzz(examples):
    return hypothesis.settings(max_examples=examples, deadline=None, derandomize=not FULL, database=None, print_blob=True,
                               suppress_health_check=list(hypothesis.HealthCheck))


def in_half(case: AttentionCase) -> AttentionCase:
    return replace(case, dtype=torch.float16, gradients=())


@fuzz(2000 if FULL else 25)
@hypothesis.given(case=dense_cases())
def test_random_dense_calls(case):
    check(in_half(case), NAME)


@fuzz(2000 if FULL else 25)
@hypothesis.given(case=varlen_cases())
def test_random_varlen_calls(case):
    check(in_half(case), NAME)


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized run")
def test_it_is_never_chosen_automatically():
    assert all(NAME not in load_profile(path).backends for path in shipped_profiles().values())


@full
@pytest.mark.skipif(SANITIZED, reason="this is the sanitized run")
def test_under_address_sanitizer():
    """The reduced grid and the own cases again, where every access beyond a tensor or a local array ends the process."""
    compiler = find_compiler().command
    preload = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    environment = {**os.environ, "LD_PRELOAD": preload, "SIMT_SANITIZE": "1", "HETERO_ATTN_FULL": "0",
                   "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:alloc_dealloc_mismatch=0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=3000", __file__, "-k", "not random"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
