"""The same call in other surroundings: arguments that merely look equal, autocast, torch.func, sizes of 0 with gradients.

A plan is found by the hash of a call's arguments, and 1 == True and (0, 1) == (False, True): what one call was allowed must not let
another pass. The rest are contexts in which torch itself changes what an operation means.
"""

import pytest
import torch

from hetero_attn import attention, attention_varlen

BACKENDS = ["sdpa", "reference"]


def tensors(B=2, Sq=5, Skv=7, Dv=12, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(B, heads, length, dim).to(dtype) for heads, length, dim in ((8, Sq, 16), (2, Skv, 16), (2, Skv, Dv))]


@pytest.mark.parametrize("name", ["is_causal", "return_lse"])
def test_a_plan_for_true_does_not_let_1_pass(name):
    q, k, v = tensors()
    for value in (False, True):
        attention(q, k, v, **{name: value})
    for value in (0, 1):
        with pytest.raises(TypeError, match=f"{name} is {value}, expected True or False"):
            attention(q, k, v, **{name: value})


def test_a_plan_for_one_mask_does_not_let_another_pass():
    q, k, v = tensors()
    attention(q, k, v, attn_mask=torch.ones(5, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attn_mask has shape \[0, 1\], expected one that broadcasts"):
        attention(q, k, v, attn_mask=torch.ones(0, 1, dtype=torch.bool))


@pytest.mark.parametrize("window", [(2.7, 0), "34", ("3", "4")])
def test_a_window_is_not_rounded_or_parsed(window):
    with pytest.raises(ValueError, match=r"window_size is .* expected two integers"):
        attention(*tensors(), window_size=window)


@pytest.mark.parametrize(("name", "value"), [("scale", True), ("softcap", True), ("scale", 10**400), ("softcap", 10**400)],
                         ids=["scale-bool", "softcap-bool", "scale-huge", "softcap-huge"])
def test_numbers_are_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} is .* expected a"):
        attention(*tensors(), **{name: value})


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("far", [2**63 - 1, 2**63, 10**30], ids=["int64-max", "beyond-int64", "10**30"])
def test_a_window_longer_than_any_sequence_is_unlimited(far, backend):
    q, k, v = (torch.randn(1, 2, n, 16) for n in (40, 20, 20))          # more queries than keys: positions below 0
    assert torch.equal(attention(q, k, v, window_size=(far, far), backend=backend), attention(q, k, v, backend=backend))


def test_a_list_is_a_window_too():
    q, k, v = tensors()
    assert torch.equal(attention(q, k, v, window_size=[2, 1]), attention(q, k, v, window_size=(2, 1)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0}, {"alibi_slopes": torch.full((8,), 0.25)}], ids=str)
def test_autocast_does_not_round_inside_the_call(options, backend):
    q, k, v = tensors()
    want = attention(q, k, v, **options, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(q, k, v, **options, backend=backend), want)
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (q, k, v))
    call = (q, k, v, torch.tensor([0, 5], dtype=torch.int32), torch.tensor([0, 7], dtype=torch.int32), 5, 7)
    want = attention_varlen(*call, **options, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_varlen(*call, **options, backend=backend), want)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0}, {"sinks": torch.ones(8)}], ids=lambda o: "".join(o))
def test_torch_func(options):
    q, k, v = tensors()
    leaf = q.clone().requires_grad_()
    attention(leaf, k, v, **options).square().sum().backward()
    gradient = torch.func.grad(lambda q: attention(q, k, v, **options).square().sum())(q)
    torch.testing.assert_close(gradient, leaf.grad)
    batched = torch.vmap(lambda q: attention(q, k, v, **options))(torch.stack([q, 2 * q]))
    torch.testing.assert_close(batched[1], attention(2 * q, k, v, **options))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [{"Sq": 0}, {"Skv": 0}, {"B": 0}], ids=str)
def test_gradients_where_a_size_is_0(sizes, backend, compiled):
    torch._dynamo.reset()
    inputs = [tensor.requires_grad_() for tensor in tensors(**sizes)]
    sinks = torch.ones(8, requires_grad=True)
    call = lambda q, k, v: attention(q, k, v, sinks=sinks, is_causal=True, backend=backend)
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    call(*inputs).sum().backward()
    for tensor in inputs:
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_no_sequences(backend):
    q, pages = torch.zeros(0, 8, 16, requires_grad=True), torch.ones(3, 4, 2, 16, requires_grad=True)
    none = torch.empty(0, dtype=torch.int32)
    out = attention_varlen(q, pages, pages, torch.tensor([0], dtype=torch.int32), None, 0, 0, block_table=none.view(0, 1), seqused_k=none,
                           backend=backend)
    out.sum().backward()
    assert out.shape == q.shape and torch.equal(pages.grad, torch.zeros_like(pages))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys_are_zeros_though_q_is_large(backend):
    """In fp16 the sum over q is inf, and 0 * inf is NaN."""
    q, k, v = tensors(B=1, Sq=64, Skv=0, dtype=torch.float16)
    q = (q * 0 + 100).requires_grad_()
    assert q.sum().isinf()
    assert torch.equal(attention(q, k, v, backend=backend), torch.zeros(1, 8, 64, 12, dtype=torch.float16))
