"""The operators under torch.compile, export, opcheck and autograd: one opaque node, the same numbers, the same gradients."""

import shutil

import pytest
import torch
from torch.library import opcheck

import hetero_attn

DENSE = torch.ops.hetero_attn.attention.default
VARLEN = torch.ops.hetero_attn.attention_varlen.default


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Each test compiles one line of this file with other options: without this they would count as recompilations."""
    torch._dynamo.reset()


def tensors(requires_grad=False, Sq=5, Skv=7):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 8, Sq, 16), torch.randn(2, 2, Skv, 16), torch.randn(2, 2, Skv, 12)
    return [t.requires_grad_(requires_grad) for t in (q, k, v)]


def packed(requires_grad=False):
    torch.manual_seed(1)
    q, k, v = torch.randn(10, 8, 16), torch.randn(14, 2, 16), torch.randn(14, 2, 16)
    starts = torch.tensor([0, 3, 3, 10], dtype=torch.int32), torch.tensor([0, 5, 9, 14], dtype=torch.int32)
    return [*(t.requires_grad_(requires_grad) for t in (q, k, v)), *starts, 7, 5]


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window_softcap_lse": {"window_size": (2, 1), "softcap": 4.0, "return_lse": True},
    "bool_mask": {"attn_mask": torch.rand(2, 1, 5, 7) > 0.4},
    "float_mask_alibi_sinks": {"attn_mask": torch.randn(5, 7), "alibi_slopes": torch.rand(2, 8), "sinks": torch.randn(8)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_compiled_equals_eager(options, layout):
    inputs = tensors() if layout == "bhsd" else [t.transpose(1, 2) for t in tensors()]
    call = lambda q, k, v: hetero_attn.attention(q, k, v, layout=layout, **options)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), call(*inputs))


def test_the_graph_holds_one_node():
    nodes = []

    def look(graph, _):
        nodes.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(lambda q, k, v: hetero_attn.attention(q, k, v, is_causal=True), fullgraph=True, backend=look)(*tensors())
    assert [n for n in nodes if "hetero_attn" in str(n)] and not [n for n in nodes if "matmul" in str(n) or "softmax" in str(n)]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_compiled_gradients_equal_eager(options):
    compiled, eager = tensors(True), tensors(True)
    call = lambda q, k, v: hetero_attn.attention(q, k, v, **options)
    first = lambda out: out[0] if isinstance(out, tuple) else out
    first(torch.compile(call, fullgraph=True, backend="aot_eager")(*compiled)).square().sum().backward()
    first(call(*eager)).square().sum().backward()
    for a, b in zip(compiled, eager):
        torch.testing.assert_close(a.grad, b.grad)


def test_compiled_varlen_with_gradients_and_changing_lengths():
    call = lambda *a: hetero_attn.attention_varlen(*a, is_causal=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for _ in range(2):
        mine, theirs = packed(True), packed(True)
        compiled(*mine).square().sum().backward()
        call(*theirs).square().sum().backward()
        for a, b in zip(mine[:3], theirs[:3]):
            torch.testing.assert_close(a.grad, b.grad)


def test_a_growing_cache_does_not_recompile_for_ever():
    compilations = []

    def count(graph, _):
        compilations.append(1)
        return graph

    compiled = torch.compile(lambda q, k, v: hetero_attn.attention(q, k, v, is_causal=True), fullgraph=True, backend=count)
    for kv_len in range(5, 15):
        q, k, v = tensors(Sq=1, Skv=kv_len)
        torch.testing.assert_close(compiled(q, k, v), hetero_attn.attention(q, k, v, is_causal=True))
    assert len(compilations) <= 2


def test_the_choice_is_made_when_the_graph_runs():
    compiled = torch.compile(lambda q, k, v: hetero_attn.attention(q, k, v), fullgraph=True, backend="aot_eager")
    compiled(*tensors())
    with pytest.raises(hetero_attn.UnknownBackendError), hetero_attn.use_backend("nobody"):
        compiled(*tensors())
    with hetero_attn.use_backend("reference"):
        torch.testing.assert_close(compiled(*tensors()), hetero_attn.attention(*tensors(), backend="reference"), rtol=0, atol=0)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_dense(return_lse, requires_grad):
    q, k, v = tensors(requires_grad)
    mask = torch.randn(5, 7, requires_grad=requires_grad)
    sinks = torch.randn(8, requires_grad=requires_grad)
    opcheck(DENSE, (q, k, v, mask, torch.rand(8), sinks, True, None, (3, -1), 2.0, return_lse, "bhsd", None))


def test_opcheck_dense_bshd():
    opcheck(DENSE, (*(t.transpose(1, 2) for t in tensors()), None, None, None, True, 0.3, (-1, -1), None, True, "bshd", "sdpa"))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_varlen(requires_grad):
    opcheck(VARLEN, (*packed(requires_grad), None, None, torch.rand(8), torch.randn(8), True, None, (-1, -1), None, True, None))


def test_opcheck_paged():
    pages = torch.randn(9, 4, 2, 16)
    table = torch.tensor([[3, 1, 7], [0, 5, 99]], dtype=torch.int32)
    starts, used = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([11, 6], dtype=torch.int32)
    keys = (torch.randn(4, 8, 16), pages, pages.clone(), starts, None, 3, 11, table, used)
    opcheck(VARLEN, (*keys, None, None, True, None, (-1, -1), None, False, None))


def test_export():
    class Block(torch.nn.Module):
        def forward(self, q, k, v):
            return hetero_attn.attention(q, k, v, is_causal=True)

    program = torch.export.export(Block(), tuple(tensors()))
    assert any("hetero_attn.attention" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*tensors()), hetero_attn.attention(*tensors(), is_causal=True))


def test_fake_tensors_need_no_backend():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, kv = torch.empty(1, 32, 4096, 128, dtype=torch.bfloat16), torch.empty(1, 8, 4096, 128, dtype=torch.bfloat16)
        out, lse = hetero_attn.attention(q, kv, kv, is_causal=True, return_lse=True)
    assert out.shape == (1, 32, 4096, 128) and out.dtype == torch.bfloat16
    assert lse.shape == (1, 32, 4096) and lse.dtype == torch.float32


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch's inductor needs a C++ compiler")
def test_inductor_decode_step():
    call = lambda q, k, v: hetero_attn.attention(q * 2, k, v, is_causal=True).relu()
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(call, fullgraph=True)(*tensors()), call(*tensors()))
