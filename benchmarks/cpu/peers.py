"""Who is timed, and whether each computes the right thing first.

ours     hetero_attn.attention(backend=NAME)
sdpa     torch's scaled_dot_product_attention (enable_gqa where heads are grouped)
flex     torch.compile(flex_attention), causal by a block mask, shapes static
ort      ONNX Runtime's com.microsoft.GroupQueryAttention, past and present bound to one buffer, two threads of its own

All read the same memory. ONNX Runtime takes q, k, v as [B, S, heads * D] and stores the new keys into the cache, a part of its operation.
A contender that objects or is wrong is reported with the reason and not timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import hetero_attn
from cpu.shapes import Shape
from cpu.timing import once
from hetero_attn import host_memory
from hetero_attn.testing.tolerances import mismatch

ROWS_CHECKED = 48                   # of every head, first and last among them
LABELS = {"ours": "hetero_attn", "sdpa": "torch SDPA", "flex": "FlexAttention", "ort": "ONNX Runtime GQA"}


@dataclass
class Contender:
    """One implementation of one call. call() returns out [B, Hq, Sq, D]; `reason` says why it is not timed."""

    name: str
    call: Callable[[], torch.Tensor] | None = None
    reason: str | None = None
    note: str = ""
    keeps: list = field(default_factory=list)           # buffers that a binding holds by address only


def contenders(
    shape: Shape, dtype: torch.dtype, backend: str, peers: bool = True, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
) -> list[Contender]:
    """Ours and the peers on `given` q, k, v (None: new ones), each checked against fp64; the wrong and the impossible have a reason."""
    q, k, v = given or operands(shape, dtype)
    makers = {"ours": lambda: _ours(shape, q, k, v, backend)}
    if peers:
        makers |= {"sdpa": lambda: _sdpa(shape, q, k, v), "flex": lambda: _flex(shape, q, k, v), "ort": lambda: _ort(shape, q, k, v)}
    rows, expected = expected_rows(shape, q, k, v)
    made = []
    for name, make in makers.items():
        try:
            contender = make()
            fault = mismatch(contender.call()[:, :, rows], expected, dtype)
            if fault:
                contender = Contender(name, reason=f"wrong: {fault}")
        except Exception as error:                      # a peer may fail in any way of its own; the table says how
            lines = str(error).strip().splitlines() or [""]
            contender = Contender(name, reason=f"{type(error).__name__}: {lines[0][:160]}")
        made.append(contender)
    return made


def operands(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, Hq, Sq, D], k and v [B, Hkv, Skv, D], standard normal, the same for every run."""
    generator = torch.Generator().manual_seed(0)
    def normal(heads: int, length: int) -> torch.Tensor:
        made = torch.randn(shape.batch, heads, length, shape.head_dim, generator=generator)
        return host_memory.empty(made.shape, dtype).copy_(made)         # in the pages that our KV cache has, for everybody

    return normal(shape.q_heads, shape.q_len), normal(shape.kv_heads, shape.kv_len), normal(shape.kv_heads, shape.kv_len)


def expected_rows(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Some query rows [R] and their result in fp64 [B, Hq, R, D]: all of it would take longer than the benchmark."""
    rows = torch.linspace(0, shape.q_len - 1, min(shape.q_len, ROWS_CHECKED)).round().long()
    places = rows[:, None] + shape.kv_len - shape.q_len
    keys = torch.arange(shape.kv_len)
    hidden = keys > places if shape.causal else torch.zeros(len(rows), shape.kv_len, dtype=torch.bool)
    if shape.window >= 0:
        hidden = hidden | (keys < places - shape.window)
    group = shape.q_heads // shape.kv_heads
    out = torch.empty(shape.batch, shape.q_heads, len(rows), shape.head_dim, dtype=torch.float64)
    for batch in range(shape.batch):
        for head in range(shape.q_heads):
            keys_of, values_of = k[batch, head // group].double(), v[batch, head // group].double()
            scores = q[batch, head, rows].double() @ keys_of.T / math.sqrt(shape.head_dim)               # [R, Skv]
            out[batch, head] = scores.masked_fill(hidden, -math.inf).softmax(-1) @ values_of
    return rows, out


def _ours(shape: Shape, q, k, v, backend: str) -> Contender:
    window = (shape.window, -1) if shape.window >= 0 else (-1, -1)
    return Contender("ours", lambda: hetero_attn.attention(q, k, v, is_causal=shape.causal, window_size=window, backend=backend))


def _sdpa(shape: Shape, q, k, v) -> Contender:
    grouped = shape.q_heads != shape.kv_heads
    return Contender("sdpa", lambda: F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=grouped))


def _flex(shape: Shape, q, k, v) -> Contender:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()                               # a compilation per shape: its best case
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if shape.causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, shape.q_len, shape.kv_len, device="cpu")
    grouped = shape.q_heads != shape.kv_heads
    return Contender("flex", lambda: compiled(q, k, v, block_mask=mask, enable_gqa=grouped))


def _ort(shape: Shape, q, k, v) -> Contender:
    """The faster of a session whose threads spin during a run (and stop at its end) and one whose threads sleep."""
    graph = _ort_graph(shape, q.dtype)
    sessions = {waiting: _ort_session(graph, shape, q, k, v, spin) for waiting, spin in (("spinning", "1"), ("sleeping", "0"))}
    times = {}
    for waiting, contender in sessions.items():
        contender.call()
        times[waiting] = min(once(contender.call) for _ in range(3))
    waiting = min(times, key=times.get)
    sessions[waiting].note = f"threads {waiting}"
    return sessions[waiting]


def _ort_graph(shape: Shape, dtype: torch.dtype) -> bytes:
    """A model of one GroupQueryAttention node."""
    from onnx import TensorProto, helper

    kind = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}[dtype]
    new, cache = [shape.batch, shape.q_len], [shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim]
    q_width, kv_width = shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    value = helper.make_tensor_value_info
    inputs = [
        value("q", kind, [*new, q_width]), value("k", kind, [*new, kv_width]), value("v", kind, [*new, kv_width]),
        value("past_k", kind, cache), value("past_v", kind, cache),
        value("last", TensorProto.INT32, [shape.batch]), value("total", TensorProto.INT32, [1]),
    ]
    outputs = [value("out", kind, [*new, q_width]), value("present_k", kind, cache), value("present_v", kind, cache)]
    node = helper.make_node(
        "GroupQueryAttention", [one.name for one in inputs], [one.name for one in outputs], domain="com.microsoft",
        num_heads=shape.q_heads, kv_num_heads=shape.kv_heads,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "attention", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _ort_session(graph: bytes, shape: Shape, q, k, v, spin: str) -> Contender:
    import onnxruntime
    from onnx import TensorProto

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", spin)
    options.add_session_config_entry("session.force_spinning_stop", "1")           # others are timed after it
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    # Everybody's keys and values: it writes the new ones back where they are already. Of two buffers in a virtual machine one may be read
    # twice as fast as the other, by how the host backs them.
    cache_k, cache_v = k, v
    out = torch.empty(shape.batch, shape.q_len, shape.q_heads, shape.head_dim, dtype=q.dtype)
    new = slice(shape.kv_len - shape.q_len, None)
    bound = {
        "q": _packed(q), "k": _packed(k[:, :, new]), "v": _packed(v[:, :, new]), "past_k": cache_k, "past_v": cache_v,
        "last": torch.full((shape.batch,), shape.kv_len - 1, dtype=torch.int32), "total": torch.tensor([shape.kv_len], dtype=torch.int32),
    }
    kinds = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16,
             torch.int32: TensorProto.INT32}
    for name, tensor in bound.items():
        binding.bind_input(name, "cpu", 0, kinds[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
    for name, tensor in (("out", out.flatten(2)), ("present_k", cache_k), ("present_v", cache_v)):
        binding.bind_output(name, "cpu", 0, kinds[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())

    def call() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return out.transpose(1, 2)

    return Contender("ort", call, keeps=[out, *bound.values()])


def _packed(x: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] -> [B, S, H * D], contiguous."""
    return x.transpose(1, 2).contiguous().flatten(2)
