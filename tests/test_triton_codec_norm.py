"""Codec and norm kernels of the Triton backend in the interpreter: payloads byte for byte, values bit for bit, norms to their rounding.

Runs itself in a process with TRITON_INTERPRET=1, as test_triton_conformance.py does.
"""

import os
import subprocess
import sys
from pathlib import Path

import codec_cases
import pytest
import torch
from codec_cases import BITS, COMMON, SHARES
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_attn.norm import rms_norm
from hetero_attn.testing.attention_cases import full_grid
from hetero_attn.testing.tolerances import assert_close

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from hetero_attn_triton import TritonBackend
    from triton_emulated import InterpretedLauncher

    BACKEND = TritonBackend(InterpretedLauncher())
    NATIVE = BACKEND.codec_kernels("cpu")
else:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own: test_in_the_interpreter")

MANY = 20 if full_grid() else 1


@inside
@settings(max_examples=20 * MANY, deadline=None, derandomize=not full_grid(), database=None)
@given(count=st.integers(0, 1200), bits=BITS, **COMMON)
def test_groups_are_the_definition(**case):
    codec_cases.groups(NATIVE, **case)


@inside
@settings(max_examples=25 * MANY, deadline=None, derandomize=not full_grid(), database=None)
@given(
    features=st.one_of(st.sampled_from([1, 2, 511, 512, 1025]), st.integers(5, 200)), first=st.integers(0, 3000),
    count=st.integers(0, 2500 if full_grid() else 1100), share=SHARES, **COMMON,                # a program a row: many take long
)
def test_features_are_the_definition(**case):
    codec_cases.features(NATIVE, **case)


NORMS = [(torch.float32, torch.float32, 0.0), (torch.bfloat16, torch.bfloat16, 0.0), (torch.bfloat16, torch.float32, 0.0),
         (torch.float16, torch.bfloat16, 1.0), (torch.bfloat16, torch.bfloat16, 1.0)]


def bits_apart(x: torch.Tensor, y: torch.Tensor) -> int:
    """The most units in the last place between 16-bit tensors."""
    ordered = lambda each: (bits := each.view(torch.int16).int(), torch.where(bits < 0, -(bits & 0x7FFF), bits))[1]
    return int((ordered(x) - ordered(y)).abs().max())


@inside
@pytest.mark.parametrize(("dtype", "weight_dtype", "offset"), NORMS, ids=str)
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 100), (1, 1), (4, 1000)] if INTERPRETED else [], ids=str)
def test_norm(dtype, weight_dtype, offset, shape):
    generator = torch.Generator().manual_seed(len(shape))
    x, weight = torch.randn(shape, generator=generator).to(dtype), torch.randn(shape[-1], generator=generator).to(weight_dtype)
    found, want = BACKEND.rms_norm(x, weight, 1e-5, offset), rms_norm(x, weight, 1e-5, offset)
    assert found.shape == x.shape and found.dtype == dtype
    assert_close(found, want, torch.float32 if dtype == torch.float32 else dtype)
    assert dtype == torch.float32 or bits_apart(found, want) <= 1
    sliced = torch.cat([x, x], -1)[..., : shape[-1]]                # rows that are not next to one another
    assert torch.equal(BACKEND.rms_norm(sliced, weight, 1e-5, offset), found)


@inside
@pytest.mark.parametrize("post", [False, True] if INTERPRETED else [])
@pytest.mark.parametrize(("dtype", "weight_dtype", "offset"), NORMS, ids=str)
def test_add_norm(dtype, weight_dtype, offset, post):
    generator = torch.Generator().manual_seed(7)
    x, residual = (torch.randn(5, 200, generator=generator).to(dtype) for _ in range(2))
    weight, post_weight = (torch.randn(200, generator=generator).to(weight_dtype) for _ in range(2))
    want_residual = residual + (rms_norm(x, post_weight, 1e-5, offset) if post else x)
    found = BACKEND.add_rms_norm(x, residual, weight, 1e-5, offset, post_weight if post else None)
    assert_close(residual, want_residual, dtype)
    assert_close(found, rms_norm(want_residual, weight, 1e-5, offset), dtype, magnitude=4)


@inside
def test_what_the_norm_does_not_take_is_torchs():
    x, weight = torch.randn(2, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    assert torch.equal(BACKEND.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5))
    x = torch.randn(2, 8, requires_grad=True)
    assert BACKEND.rms_norm(x, torch.ones(8), 1e-5).requires_grad
    assert BACKEND.rms_norm(torch.randn(0, 8), torch.ones(8), 1e-5).shape == (0, 8)
    with pytest.raises(ValueError, match=r"weight is \[7\], expected \[8\]"):
        BACKEND.rms_norm(torch.randn(2, 8), torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match=r"x is \[2, 8\], residual \[3, 8\]"):
        BACKEND.add_rms_norm(torch.randn(2, 8), torch.randn(3, 8), torch.ones(8), 1e-5)
    assert BACKEND.codec_kernels("cuda") is None


@pytest.mark.skipif(INTERPRETED, reason="this is the process of its own")
@pytest.mark.timeout(3000 if full_grid() else 280)
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=0", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout
