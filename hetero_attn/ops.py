"""attention() and attention_varlen(): arguments → spec → backend → result.

What a call's arguments say about themselves (shapes, dtypes, options) is checked and decided once and remembered as a plan;
repeating the call costs one dictionary look-up. Eager calls go straight to the backend. Whatever traces or rewrites operators
(torch.compile, export, fake tensors, dispatch modes) sees one opaque operator, registered in hetero_attn/library.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

from hetero_attn import registry
from hetero_attn.arguments import check_lengths, dense_spec, varlen_spec
from hetero_attn.backend import Backend
from hetero_attn.spec import AttentionSpec, Operands

_PLANS_KEPT = 1024
_PLAIN = (torch.Tensor, torch.nn.Parameter)             # anything else is a subclass that may be tracing
_NO_OPERANDS = Operands()
_autocast = torch._C._is_any_autocast_enabled
_transform_level = torch._C._functorch.maybe_current_level


class _Plan:
    """A checked call and its backend, remembered by the call's form: all but its lengths, so that a decode loop makes one plan."""

    __slots__ = ("backend", "holds", "name", "spec")

    def __init__(self, spec: AttentionSpec, name: str | None) -> None:
        self.spec, self.name = spec, name
        self.backend, _, self.holds = registry.select(spec, name)

    def at(self, batch: int, q_len: int, kv_len: int, total_q: int) -> tuple[AttentionSpec, Backend]:
        """The same form at other lengths: a new spec, and a new choice only where a backend judges lengths."""
        spec = self.spec.at(batch, q_len, kv_len, total_q)
        backend = self.backend if self.holds else registry.select(spec, self.name).backend
        if self.holds:
            self.spec = spec
        return spec, backend


_plans: dict[tuple, _Plan] = {}


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Sequence[int] = (-1, -1),
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    layout: str = "bhsd",
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention, causal and windowed BOTTOM-RIGHT: query i stands at key i + Skv - Sq (torch's is_causal: top-left when Sq != Skv).

    q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv] of one dtype and device, Hq a multiple of Hkv; layout="bshd" for
    [B, S, H, D]. Returns out [B, Hq, Sq, Dv] (in the layout) in q's dtype; with return_lse also lse [B, Hq, Sq], fp32 (fp64 for
    fp64), natural log, without gradient.

    In this order: s = scale * q @ k.T (scale: 1/sqrt(D)); softcap * tanh(s / softcap); minus alibi_slopes * |distance| (fp32 [Hq]
    or [B, Hq]); plus a float attn_mask (any float dtype, added in fp32; finfo.min is a number, not -inf); then only keys that are
    within causality AND window AND a bool attn_mask (True = attend) are kept. sinks [Hq] join the softmax's denominator and the
    lse, nothing else. attn_mask broadcasts to [B, Hq, Sq, Skv] whatever the layout. window_size = (left, right), inclusive,
    -1 = unlimited: a model's "sliding window W" is left = W - 1. A row that sees no key gives zeros and lse = -inf (or its sink).

    `backend` names one: it runs or raises. Otherwise use_backend(), HETERO_ATTN_BACKEND or the profile's list decides.

    Raises ValueError or TypeError for arguments that do not fit together, UnsupportedError when no backend asked runs the call,
    UnknownBackendError for a name nothing answers to.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _is_traced(q):
        out, lse = torch.ops.hetero_attn.attention(
            q, k, v, attn_mask, alibi_slopes, sinks, is_causal, scale, window_size, softcap, return_lse, layout, backend
        )
        return (out, lse) if return_lse else out
    return run_dense(
        q, k, v, attn_mask, is_causal, scale, window_size, softcap, alibi_slopes, sinks, return_lse, layout, backend,
        differentiates(q, k, v, attn_mask, alibi_slopes, sinks),
    )


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    block_table: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Sequence[int] = (-1, -1),
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """attention() over B packed sequences, each its own BOTTOM-RIGHT problem: its last query stands at its last key.

    q [Tq, Hq, D]; cu_seqlens_q [B+1] int32, cumulative lengths from 0 to Tq. Keys either packed, k [Tk, Hkv, D] and
    v [Tk, Hkv, Dv] with cu_seqlens_k; or paged, k and v [num_blocks, block_size, Hkv, D] with block_table [B, max_blocks] int32
    and lengths seqused_k [B] int32 (cu_seqlens_k is then None; table entries beyond a length are never read).
    max_seqlen_q and max_seqlen_k bound the lengths. Returns out [Tq, Hq, Dv]; with return_lse also lse [Hq, Tq].

    The options mean what they mean in attention(); alibi_slopes [B, Hq] has a row a sequence. Raises as attention() does; lengths
    that contradict each other are found on CPU tensors only (device tensors are not synchronised for a check).
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _is_traced(q):
        out, lse = torch.ops.hetero_attn.attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k, alibi_slopes, sinks,
            is_causal, scale, window_size, softcap, return_lse, backend,
        )
        return (out, lse) if return_lse else out
    return run_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k, is_causal, scale, window_size,
        softcap, alibi_slopes, sinks, return_lse, backend, differentiates(q, k, v, None, alibi_slopes, sinks),
    )


def run_dense(q, k, v, attn_mask, is_causal, scale, window_size, softcap, alibi_slopes, sinks, return_lse, layout, backend, needs_grad):
    """attention() once nothing traces: plan, run, give back out or (out, lse)."""
    plan = form = None
    try:
        if layout == "bhsd":
            (B, Hq, Sq, D), (Bk, Hkv, Skv, Dk), (Bv, Hv, Sv, Dv) = q.shape, k.shape, v.shape
        else:
            (B, Sq, Hq, D), (Bk, Skv, Hkv, Dk), (Bv, Sv, Hv, Dv) = q.shape, k.shape, v.shape
        # (bool alone: 1 == True would find True's plan, so that 1 passed or was refused by what had been called before)
        if B == Bk == Bv and Skv == Sv and Hkv == Hv and D == Dk and type(is_causal) is bool and type(return_lse) is bool:
            if type(window_size) is list:
                window_size = tuple(window_size)
            form = (
                Hq, Hkv, D, Dv, _size_class(B, Sq, Skv), q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, is_causal, scale,
                window_size, softcap, return_lse, layout, needs_grad, registry.choice(backend),
                None if attn_mask is None else _mask_form(attn_mask, (B, Hq, Sq, Skv)), _form_of(alibi_slopes), _form_of(sinks),
            )
            plan = _plans.get(form)
    except (AttributeError, TypeError, ValueError):     # an argument is no tensor, or unhashable: the checks name it or take it
        form = None
    if plan is None:
        spec = dense_spec(
            q, k, v, attn_mask, is_causal, scale, window_size, softcap, alibi_slopes, sinks, return_lse, layout, needs_grad
        )
        plan = _remember(form, spec, backend)
    spec, chosen = plan.spec, plan.backend
    if spec.kv_len != Skv or spec.q_len != Sq or spec.batch != B:
        spec, chosen = plan.at(B, Sq, Skv, B * Sq)
    if attn_mask is not None and attn_mask.dim() < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    plain = attn_mask is None and alibi_slopes is None and sinks is None
    operands = _NO_OPERANDS if plain else Operands(attn_mask, alibi_slopes, sinks)
    run = chosen.attention if not _autocast() else _exactly(chosen, spec.device)
    if layout == "bshd":
        out, lse = run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), spec, operands)
        out = out.transpose(1, 2)
    else:
        out, lse = run(q, k, v, spec, operands)
    return (out, lse) if return_lse else out


def run_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k, is_causal, scale, window_size, softcap,
    alibi_slopes, sinks, return_lse, backend, needs_grad,
):
    """attention_varlen() once nothing traces: plan, check the lengths' values, run, give back out or (out, lse)."""
    try:
        B, (Tq, Hq, D), (k_rows, *k_axes), (v_rows, *v_axes) = cu_seqlens_q.shape[0] - 1, q.shape, k.shape, v.shape
        form = plan = None
        plain = type(max_seqlen_q) is type(max_seqlen_k) is int and type(is_causal) is type(return_lse) is bool
        if plain and type(window_size) is list:
            window_size = tuple(window_size)
        if plain and k_rows == v_rows and k_axes[:-1] == v_axes[:-1] and k_axes[-1] == D:
            form = (
                Hq, D, *k_axes, v_axes[-1], _size_class(B, max_seqlen_q, max_seqlen_k), B, Tq if Tq < 2 else 2, q.dtype, k.dtype,
                v.dtype, q.device, k.device, v.device, _index_form(cu_seqlens_q), _index_form(cu_seqlens_k), _index_form(block_table),
                _index_form(seqused_k), is_causal, scale, window_size, softcap, return_lse, needs_grad, registry.choice(backend),
                _form_of(alibi_slopes), _form_of(sinks),
            )
            plan = _plans.get(form)
    except (AttributeError, TypeError, ValueError, IndexError):
        form = plan = None
    if plan is None:
        spec = varlen_spec(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k, is_causal, scale, window_size,
            softcap, alibi_slopes, sinks, return_lse, needs_grad,
        )
        plan = _remember(form, spec, backend)
    spec, chosen = plan.spec, plan.backend
    if spec.kv_len != max_seqlen_k or spec.q_len != max_seqlen_q or spec.total_q != Tq:
        spec, chosen = plan.at(B, max_seqlen_q, max_seqlen_k, Tq)
    if spec.device == "cpu":
        check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k)
    operands = Operands(None, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, block_table, seqused_k)
    run = chosen.attention if not _autocast() else _exactly(chosen, spec.device)
    out, lse = run(q, k, v, spec, operands)
    return (out, lse) if return_lse else out


def _remember(form: tuple | None, spec: AttentionSpec, backend: str | None) -> _Plan:
    plan = _Plan(spec, registry.chosen_name(backend))
    if form is not None:
        if len(_plans) >= _PLANS_KEPT:                  # emptied when full: a plan is cheaper to make than to age
            _plans.clear()
        _plans[form] = plan
    return plan


def _exactly(backend: Backend, device: str):
    """backend.attention with torch.autocast off: the call's dtypes are the caller's, and its float32 arithmetic stays float32."""

    def run(*call):
        with torch.autocast(device, enabled=False):
            return backend.attention(*call)

    return run if torch.amp.is_autocast_available(device) else backend.attention


def _size_class(B: int, Sq: int, Skv: int) -> int:
    """What a backend that does not judge lengths may still know of them: none, one or many, and which of q and kv is longer."""
    order = 0 if Sq == Skv else 1 if Sq < Skv else 2
    return (B if B < 2 else 2) + 3 * (Sq if Sq < 2 else 2) + 9 * (Skv if Skv < 2 else 2) + 27 * order


def _mask_form(mask: torch.Tensor, full: tuple[int, int, int, int]) -> tuple:
    """dtype, device and which axes a mask broadcasts; its shape where it does not fit, for the checks to refuse."""
    own = mask.shape
    sizes = full[4 - len(own) :]
    fits = len(own) <= 4 and all(size == 1 or size == wanted for size, wanted in zip(own, sizes))
    return mask.dtype, mask.device, tuple([size == 1 for size in own]) if fits else (own,)     # (own itself: (0, 1) == (False, True))


def _is_traced(q) -> bool:
    return type(q) not in _PLAIN and isinstance(q, torch.Tensor)


def _form_of(tensor: torch.Tensor | None) -> tuple | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _index_form(tensor: torch.Tensor | None) -> tuple | None:
    return None if tensor is None else (len(tensor), tensor.dim(), tensor.dtype, tensor.device)


def differentiates(*tensors: torch.Tensor | None) -> bool:
    """Whether torch must see through the call: for a gradient, or because torch.func (grad, vmap, jvp) or forward AD is at work."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and getattr(tensor, "requires_grad", False):
                return True
    return _transform_level() is not None or forward_ad._current_level >= 0
