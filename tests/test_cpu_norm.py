"""The cpu backend's rms_norm against hetero_attn.norm.rms_norm, on every instruction set of this machine; what it declines is torch's."""

import pytest
import torch
from hetero_attn_cpu import CpuBackend
from hetero_attn_cpu.instruction_sets import of_this_cpu

from hetero_attn.norm import rms_norm

ULPS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}       # two roundings, and a mean summed in another order
SETS = [each.name for each in of_this_cpu()]


@pytest.fixture(scope="module", params=SETS)
def backend(request):
    made = CpuBackend(request.param)
    assert made.unavailable_reasons() == []
    return made


@pytest.mark.parametrize("dtype", ULPS, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 2048), (3, 5), (7, 64), (2, 3, 129), (130, 515), (64,)])
def test_as_the_definition(backend, shape, offset, dtype):
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    kept = x.clone()
    out = backend.rms_norm(x, weight, 1e-5, offset)
    assert out.dtype == dtype and out.shape == x.shape and torch.equal(x, kept)
    torch.testing.assert_close(out, rms_norm(x, weight, 1e-5, offset), rtol=ULPS[dtype], atol=ULPS[dtype])


def test_llama_rounds_before_the_weight(backend):
    """A weight that a second rounding separates from Gemma's order: the definition's own answers differ, and so must these."""
    torch.manual_seed(1)
    x, weight = torch.randn(64, 256).bfloat16(), torch.randn(256).bfloat16()
    llama, gemma = rms_norm(x, weight, 1e-6), rms_norm(x, weight - 1, 1e-6, 1.0)
    assert not torch.equal(llama, gemma)
    same = (backend.rms_norm(x, weight, 1e-6) == llama).float().mean()
    assert same > 0.999                              # a mean summed in another order may move one rounding in thousands


def test_rows_apart_and_reversed_columns(backend):
    x, weight = torch.randn(9, 40), torch.randn(20)
    for view in (x[:, :20], x[::2, 10:30], x.t()[:20].t(), x[:, :20].flip(1), x[:, ::2]):
        torch.testing.assert_close(backend.rms_norm(view, weight, 1e-5), rms_norm(view, weight, 1e-5), rtol=2e-6, atol=2e-6)


def test_same_bits_for_any_number_of_threads(backend):
    x, weight = torch.randn(300, 512).bfloat16(), torch.randn(512).bfloat16()
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(backend.rms_norm(x, weight, 1e-5))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_what_it_declines_is_torchs(backend):
    x, weight = torch.randn(4, 8), torch.randn(8)
    wide = backend.rms_norm(x.double(), weight.double(), 1e-5)
    assert wide.dtype == torch.float64 and torch.equal(wide, rms_norm(x.double(), weight.double(), 1e-5))
    assert torch.equal(backend.rms_norm(x.half(), weight, 1e-5), rms_norm(x.half(), weight, 1e-5))          # another dtype's weight
    assert backend.rms_norm(x[:0], weight, 1e-5).shape == (0, 8)
    learned = weight.clone().requires_grad_()
    backend.rms_norm(x, learned, 1e-5).sum().backward()
    assert learned.grad is not None
    with pytest.raises(ValueError, match=r"expected \[8\]"):
        backend.rms_norm(x, torch.randn(7), 1e-5)
