"""The operators torch.compile, export and autograd-through-compile see: hetero_attn::attention and ::attention_varlen.

They are opaque: the choice of a backend happens when the compiled graph runs, as in eager mode. Their backward runs the forward
again on a backend that has gradients and differentiates that, because an opaque operator cannot keep a backend's autograd graph.
"""

from __future__ import annotations

import torch

from hetero_attn import ops

_library = torch.library.Library("hetero_attn", "DEF")
_OPTIONS = "bool is_causal, float? scale, int[2] window_size, float? softcap, bool return_lse"
_DENSE = f"Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, {_OPTIONS}, str layout, str? backend"
_VARLEN = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    f"Tensor? block_table, Tensor? seqused_k, Tensor? alibi_slopes, Tensor? sinks, {_OPTIONS}, str? backend"
)
_library.define(f"attention({_DENSE}) -> (Tensor out, Tensor lse)")
_library.define(f"attention_varlen({_VARLEN}) -> (Tensor out, Tensor lse)")
_library.define(f"attention_backward(Tensor grad, {_DENSE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(f"attention_varlen_backward(Tensor grad, {_VARLEN}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")


def _lse_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _owned(out, q: torch.Tensor, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Fresh, contiguous outputs, as the fake kernels promise; an empty tensor stands for an lse nobody asked for."""
    out, lse = out if return_lse else (out, q.new_empty(0, dtype=_lse_dtype(q)))
    return out.contiguous(), lse.contiguous()


def _attention(q, k, v, attn_mask, alibi_slopes, sinks, is_causal, scale, window_size, softcap, return_lse, layout, backend):
    out = ops.run_dense(
        q, k, v, attn_mask, is_causal, scale, tuple(window_size), softcap, alibi_slopes, sinks, return_lse, layout, backend, False
    )
    return _owned(out, q, return_lse)


def _attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k, alibi_slopes, sinks, is_causal, scale,
    window_size, softcap, return_lse, backend,
):
    out = ops.run_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k, is_causal, scale, tuple(window_size),
        softcap, alibi_slopes, sinks, return_lse, backend, False,
    )
    return _owned(out, q, return_lse)


def _attention_fake(q, k, v, attn_mask, alibi_slopes, sinks, is_causal, scale, window_size, softcap, return_lse, layout, backend):
    heads, length = (1, 2) if layout == "bhsd" else (2, 1)
    lse = (q.shape[0], q.shape[heads], q.shape[length]) if return_lse else (0,)
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(lse, dtype=_lse_dtype(q))


def _attention_varlen_fake(q, k, v, *operands_and_options):
    return_lse = operands_and_options[-2]
    lse = (q.shape[1], q.shape[0]) if return_lse else (0,)
    return q.new_empty((*q.shape[:2], v.shape[-1])), q.new_empty(lse, dtype=_lse_dtype(q))


# Gradients. The differentiable inputs are the tensors in _INPUTS; the rest of the arguments only steer.
_INPUTS = {"attention": (0, 1, 2, 3, 4, 5), "attention_varlen": (0, 1, 2, 9, 10)}


def _gradients(forward, positions, grad, arguments) -> tuple[torch.Tensor, ...]:
    """d(out)/d(inputs) contracted with `grad`; an empty tensor where an input is absent or integer."""
    arguments = list(arguments)
    leaves = []
    for position in positions:
        tensor = arguments[position]
        if tensor is not None and tensor.dtype.is_floating_point:
            arguments[position] = tensor.detach().requires_grad_()
            leaves.append(position)
    with torch.enable_grad():
        out = forward(arguments)
    inputs = [arguments[p] for p in leaves]
    # materialize_grads: an input without influence (sinks where there is no row) has a gradient of zeros, as the fake kernel says.
    if out.requires_grad:
        gradients = torch.autograd.grad(out, inputs, grad, materialize_grads=True)
    else:
        gradients = [torch.zeros_like(tensor) for tensor in inputs]
    found = dict(zip(leaves, gradients))
    return tuple(found[p].contiguous() if p in found else grad.new_empty(0) for p in positions)


def _attention_backward(grad, *arguments):
    def forward(a):
        return ops.run_dense(*a[:4], a[6], a[7], tuple(a[8]), a[9], a[4], a[5], False, a[11], a[12], True)

    return _gradients(forward, _INPUTS["attention"], grad, arguments)


def _attention_varlen_backward(grad, *arguments):
    def forward(a):
        return ops.run_varlen(*a[:9], a[11], a[12], tuple(a[13]), a[14], a[9], a[10], False, a[16], True)

    return _gradients(forward, _INPUTS["attention_varlen"], grad, arguments)


def _backward_fake(name: str):
    def fake(grad, *arguments):
        inputs = [arguments[p] for p in _INPUTS[name]]
        return tuple(
            grad.new_empty(0) if x is None or not x.dtype.is_floating_point else x.new_empty(x.shape) for x in inputs
        )

    return fake


def _register(name: str, forward, forward_fake, backward, count: int) -> None:
    """Implementation, fake kernel and autograd formula of one operator, and of the operator that is its backward."""
    positions = _INPUTS[name]
    backward_op = getattr(torch.ops.hetero_attn, f"{name}_backward")

    def setup_context(ctx, inputs, output) -> None:
        ctx.tensors = [p for p, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(*(inputs[p] for p in ctx.tensors))
        ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx, grad_out, grad_lse):
        arguments = list(ctx.others)
        for position, tensor in zip(ctx.tensors, ctx.saved_tensors):
            arguments[position] = tensor
        gradients = dict(zip(positions, backward_op(grad_out, *arguments)))
        return tuple(gradients[p] if p in gradients and ctx.needs_input_grad[p] else None for p in range(count))

    torch.library.impl(f"hetero_attn::{name}", "CompositeExplicitAutograd", lib=_library)(forward)
    torch.library.register_fake(f"hetero_attn::{name}", forward_fake, lib=_library)
    torch.library.register_autograd(f"hetero_attn::{name}", differentiate, setup_context=setup_context, lib=_library)
    torch.library.impl(f"hetero_attn::{name}_backward", "CompositeExplicitAutograd", lib=_library)(backward)
    torch.library.register_fake(f"hetero_attn::{name}_backward", _backward_fake(name), lib=_library)


_register("attention", _attention, _attention_fake, _attention_backward, 13)
_register("attention_varlen", _attention_varlen, _attention_varlen_fake, _attention_varlen_backward, 17)
