"""The CPU backend's linear: y = x · weightᵀ + bias with fp32 sums and one rounding, on every instruction set that this machine has.

Held to float64, with the error that fp32 sums may have: so much per term, and half a unit in the last place of the result's dtype. Shapes
sit on both sides of every edge of the kernels: vectors along K and their tails, tiles of rows, groups and blocks of the weight.
"""

import pytest
import torch
from hetero_attn_cpu import CpuBackend
from hetero_attn_cpu.instruction_sets import of_this_cpu
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_attn import registry

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {torch.float32: 2.0**-126, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-126}   # half the smallest step; bf16 dots flush below it

# (M, N, K): 1..8 rows go one way, more the other; 3 weight rows a group, 48 a block; vectors of 4, 8, 16 or 32; K in several blocks.
SHAPES = [(1, 1, 1), (1, 5, 7), (1, 300, 129), (2, 48, 64), (3, 47, 33), (4, 97, 255), (5, 17, 31), (6, 7, 1000), (7, 50, 96), (8, 49, 65),
          (9, 3, 16), (12, 145, 770), (16, 4, 2), (17, 100, 1600), (31, 48, 1), (32, 96, 512), (33, 50, 3000), (300, 51, 40), (520, 2, 900)]


@pytest.fixture(scope="module", params=[each.name for each in of_this_cpu()])
def backend(request):
    backend = CpuBackend(request.param)
    reasons = backend.unavailable_reasons()
    if reasons:
        pytest.skip("; ".join(reasons))
    return backend


def make(m, n, k, dtype, bias=True, pad=(0, 0), seed=0):
    """x [m, k], weight [n, k] as views of wider rows, NaN in between, so that a read beyond a row is seen; bias [n] or None."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for rows, gap in zip((m, n), pad):
        wide = torch.full((rows, k + gap), float("nan"), dtype=dtype)
        wide[:, :k] = torch.randn(rows, k, generator=generator).to(dtype)
        tensors.append(wide[:, :k])
    return *tensors, torch.randn(n, generator=generator).to(dtype) if bias else None


def check(y, x, weight, bias):
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    bound = HALF_ULP[y.dtype] * exact.abs() * 1.01 + 1e-6 * magnitude + TINY[y.dtype]
    excess = (y.double() - exact).abs() - bound
    assert not (excess > 0).any() and not excess.isnan().any(), f"{y.dtype}: off by {excess.max()} beyond what rounding explains"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(backend, shape, dtype):
    for bias in (True, False):
        x, weight, b = make(*shape, dtype, bias)
        check(backend.linear(x, weight, b), x, weight, b)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(m=st.integers(1, 40), n=st.integers(1, 110), k=st.integers(1, 400), dtype=st.sampled_from(DTYPES), bias=st.booleans(),
       pad=st.tuples(st.integers(0, 9), st.integers(0, 9)), out_pad=st.integers(0, 5), seed=st.integers(0, 99))
def test_any_shape_and_row_stride(backend, m, n, k, dtype, bias, pad, out_pad, seed):
    x, weight, b = make(m, n, k, dtype, bias, pad, seed)
    wide = torch.full((m, n + out_pad), 7.0, dtype=dtype)
    y = backend.linear(x, weight, b, out=wide[:, :n])
    check(y, x, weight, b)
    assert (wide[:, n:] == 7).all()                        # nothing is written beyond a row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 4, 9, 33])
def test_the_same_bits_for_any_number_of_threads(backend, m, dtype):
    x, weight, bias = make(m, 700, 900, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(backend.linear(x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, k", [(0, 5, 8), (3, 0, 8), (0, 0, 0), (3, 5, 0), (40, 5, 0)])
def test_empty_axes(backend, m, n, k, dtype):
    x, weight, bias = make(m, n, k, dtype)
    assert torch.equal(backend.linear(x, weight, bias), bias.expand(m, n))       # an empty sum is the bias alone
    assert torch.equal(backend.linear(x, weight), torch.zeros(m, n, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 5, 20])
def test_what_is_not_finite_stays_in_its_row_and_column(backend, m, dtype):
    x, weight, bias = make(m, 60, 75, dtype)
    clean = backend.linear(x, weight, bias)
    x[0, 74], weight[59, 3] = float("inf"), float("nan")                         # in a tail of K, and in the last row of the weight
    y = backend.linear(x, weight, bias)
    assert y[:, 59].isnan().all()
    assert torch.equal(y[0, :59], torch.where(weight[:59, 74] > 0, float("inf"), -float("inf")).to(dtype))
    assert torch.equal(y[1:, :59], clean[1:, :59])


def test_sums_are_fp32_and_rounded_once(backend):
    """In fp16, 4096 products of 1 and then 1/8 more: a half accumulator stops at 2048, a rounding before the bias loses the 1/8."""
    x, weight = torch.ones(2, 4097, dtype=torch.float16), torch.ones(3, 4097, dtype=torch.float16)
    weight[:, -1] = 0.125
    bias = torch.tensor([-4096.0, 0.0, 1.0], dtype=torch.float16)
    expected = torch.tensor([0.125, 4096.0, 4096.0], dtype=torch.float16).expand(2, 3)       # 4097.125 rounds to 4096: the step is 4
    assert torch.equal(backend.linear(x, weight, bias), expected)
    large = torch.full((1, 2), 60000.0, dtype=torch.float16)
    assert backend.linear(large, torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float16)).tolist() == [[0.0, float("inf")]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_subnormals_are_numbers(backend, dtype):
    smallest = {torch.float32: 2.0**-149, torch.float16: 2.0**-24}[dtype]
    for m in (1, 20):
        x, weight = torch.full((m, 9), smallest, dtype=dtype), torch.zeros(4, 9, dtype=dtype)
        weight[:, 8] = torch.tensor([1.0, -3.0, 0.0, 2.0])
        assert torch.equal(backend.linear(x, weight), torch.tensor([1.0, -3.0, 0.0, 2.0]).mul(smallest).to(dtype).expand(m, 4))


def test_the_registry_hands_out_this_linear():
    backend = registry.get("cpu")
    if backend.unavailable_reasons():
        pytest.skip("; ".join(backend.unavailable_reasons()))
    for shape in ((3, 20, 50), (2, 7, 20, 50)):                                  # leading axes are rows
        x, weight, bias = make(shape[-3], shape[-2], shape[-1], torch.bfloat16)
        x = x.expand(*shape[:-3], *x.shape)
        y = backend.linear(x, weight, bias)
        assert y.shape == (*shape[:-2], shape[-2])
        check(y.reshape(-1, shape[-2]), x.reshape(-1, shape[-1]), weight, bias)
