"""The two-level kernel of the ascend backend in Triton's interpreter: conformance, above all of what the fused operators do not express.

Runs under TRITON_INTERPRET=1 in the environment that has triton-ascend (`make test-ascend`), or beside any triton; elsewhere it is skipped.
The interpreter multiplies bf16 wrongly, so bf16 products are made in fp32 there.
"""

import os
import zlib
from contextlib import contextmanager
from dataclasses import replace

import hypothesis
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1: `make test-ascend` runs this file in a process of its own", allow_module_level=True)
pytest.importorskip("triton")

import hetero_attn_ascend.kernel_launch as kernel_launch
from hetero_attn_ascend.chip import Chip
from hetero_attn_ascend.kernel_launch import TwoLevelKernel, unsupported

from hetero_attn import registry
from hetero_attn.backend import Backend, UnsupportedError
from hetero_attn.profile import load_profile
from hetero_attn.testing.attention import _broken_promises, broken_promises, check
from hetero_attn.testing.attention_cases import attention_cases, full_grid
from hetero_attn.testing.cases import AttentionCase
from hetero_attn.testing.test_attention_hypothesis import dense_cases, varlen_cases

NAME = "ascend-kernel-emulated"
pytestmark = [pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),            # numpy on poison
              pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")]           # the interpreter's own


def reduce_by_numpy():
    """triton-ascend's own tl.max is unknown to its interpreter, which then reduces number by number in Python: a hundred times as slow."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    known = getattr(tl.max, "fn", tl.max).__globals__.get("_elementwise_max_default")
    if known is None:
        return
    original = interpreter.ReduceOps.apply_impl

    def apply_impl(self, inputs):
        return self.min_max(inputs[0], val_reduce_op=np.max) if self.combine_fn == known else original(self, inputs)

    interpreter.ReduceOps.apply_impl = apply_impl


reduce_by_numpy()
CHIP = Chip.of(load_profile("ascend910b"))


class KernelBackend(Backend):
    """The kernel alone, on CPU tensors by the interpreter."""

    name = NAME

    def __init__(self):
        self._kernel = TwoLevelKernel(CHIP, upcast=lambda dtype: dtype == torch.bfloat16)

    def unsupported_reasons(self, spec):
        gradients = ["gradients are needed, the kernel has no backward"] if spec.needs_grad else []
        return [*gradients, *unsupported(spec)]

    def attention(self, q, k, v, spec, operands):
        return self._kernel.attention(q, k, v, spec, operands)


@pytest.fixture(scope="module", autouse=True)
def backend():
    with registry.register(NAME, KernelBackend):
        yield


# One case of each feature, and an eighth of the rest by the sum of their names; HETERO_ATTN_FULL=1 runs them all.
QUICK = ("causal-5x49-fp32", "window-3,5-causal-49x5-fp32", "alibi-per-batch-causal-5x49-fp32",
         "softcap-causal-fp32", "sinks-normal-bfloat16-49x5-fp32", "mask-bias -inf-bfloat16-fp32", "mask-min-causal-float32-fp32",
         "mask-empty rows-b1q1-fp32",
         "memory-interleaved-bshd-operands-fp32", "varlen-mixed-everything-fp32", "paged-16-everything-decode-fp32",
         "poison-nan-varlen-everything-fp32", "head_dim-13-13-fp32", "numbers-logits-of-1e4-fp32", "batch-0-fp32",
         "lengths-5x0-fp32", "everything-fp16", "causal-37x37-bf16")


def chosen() -> list[AttentionCase]:
    cases = [case for case in attention_cases() if not case.gradients and case.dtype != torch.float64]
    assert set(QUICK) <= {case.name for case in cases}
    return [case for case in cases if full_grid() or case.name in QUICK or zlib.crc32(case.name.encode()) % 8 == 0]


def check_quickly(case):
    """The kernel writes the lse whether it is asked for or not, so with it is enough: half the calls."""
    complaints = _broken_promises(case, NAME, "cpu", True)
    assert not complaints, f"{complaints} {case.describe()}"


@pytest.mark.parametrize("case", chosen(), ids=lambda case: case.name)
def test_conformance(case):
    try:
        check(case, NAME) if full_grid() else check_quickly(case)
    except UnsupportedError as objection:
        pytest.skip("; ".join(objection.reasons[NAME]))


def fuzz(examples):
    return hypothesis.settings(max_examples=examples, deadline=None, derandomize=not full_grid(), database=None, print_blob=True,
                               suppress_health_check=list(hypothesis.HealthCheck))


@fuzz(1500 if full_grid() else 15)
@hypothesis.given(case=dense_cases())
def test_random_dense_calls(case):
    check(replace(case, gradients=()), NAME)


@fuzz(1500 if full_grid() else 15)
@hypothesis.given(case=varlen_cases())
def test_random_varlen_calls(case):
    check(replace(case, gradients=()), NAME)


SMALL = {"batch": 1, "q_heads": 1, "kv_heads": 1, "head_dim": 16}
# Blocks that an edge crosses on the left and on the right, and whole ones between them.
EDGES = [
    AttentionCase("several-blocks", q_len=150, kv_len=4500, is_causal=True, window_size=(4200, -1), lse="always", **SMALL),
    AttentionCase("band", q_len=130, kv_len=4500, window_size=(4100, 90), softcap=3.0, lse="never", **SMALL),
    AttentionCase("folded", q_len=1, kv_len=4200, alibi=2, sinks=torch.float32, mask="bias -inf", mask_axes="1h1k", window_size=(4000, -1),
                  lse="always", **(SMALL | {"q_heads": 8})),
]


@pytest.mark.parametrize("case", EDGES, ids=lambda case: case.name)
def test_edges(case):
    check(case, NAME) if full_grid() else check_quickly(case)


def test_without_lse():
    check(AttentionCase("without", q_len=3, kv_len=5, lse="always", **SMALL), NAME)


@contextmanager
def patched(monkeypatch, **changes):
    for name, change in changes.items():
        monkeypatch.setattr(kernel_launch, name, change)
    yield


FAULTY = AttentionCase("fault", batch=1, q_len=50, kv_len=70, q_heads=2, kv_heads=1, head_dim=16, is_causal=True, window_size=(30, -1),
                       poison="nan", lse="never")


def test_without_a_fault():
    check(FAULTY, NAME)


@pytest.mark.parametrize("fault", ["inverted tiling-mask", "a task lost", "guard off"])
def test_a_fault_is_caught(fault, monkeypatch):
    changes = {
        "inverted tiling-mask": {"tiling_mask": lambda size, dtype, device: 1 - kernel_launch_mask(size, dtype, device)},
        "a task lost": {"even_split": lambda weights, cores: [[index for index in range(len(weights)) if index != 1]]},
        "guard off": {"finite": lambda spec, k, v, q_len, q_heads: (k, v, None)},
    }[fault]
    kernel_launch_mask = kernel_launch.tiling_mask
    with patched(monkeypatch, **changes), registry.register("faulty-kernel", KernelBackend):
        assert broken_promises(FAULTY, "faulty-kernel"), fault
