"""Check a call's arguments and turn them into an AttentionSpec.

Every objection names the argument, what it was, and what was expected; nothing is dropped, broadcast or cast in silence.
Values (as opposed to shapes) of cu_seqlens and lengths are checked on CPU tensors only: reading a device tensor would make
every call wait for the device.
"""

from __future__ import annotations

import math
import operator

import numpy
import torch

from hetero_attn.spec import FLOAT_DTYPES, LAYOUTS, AttentionSpec, dtype_name

INT32 = (torch.int32,)
FARTHEST = 2**62                      # what a longer window becomes: positions added to it stay 64-bit integers


def dense_spec(q, k, v, attn_mask, is_causal, scale, window_size, softcap, alibi_slopes, sinks, return_lse, layout, needs_grad):
    """The AttentionSpec of an attention() call. Raises ValueError or TypeError."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, expected one of {', '.join(map(repr, LAYOUTS))}")
    _check_tensors(q, k, v)
    axes = "[B, H, S, D]" if layout == "bhsd" else "[B, S, H, D]"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected four axes {axes} (layout={layout!r})")
    heads, length = (1, 2) if layout == "bhsd" else (2, 1)
    B, Hq, Sq, D = q.shape[0], q.shape[heads], q.shape[length], q.shape[3]
    Hkv, Skv, Dv = k.shape[heads], k.shape[length], v.shape[3]
    if k.shape[0] != B or v.shape[0] != B:
        raise ValueError(f"batch sizes differ: q has {B}, k has {k.shape[0]}, v has {v.shape[0]}; expected one batch size ({axes})")
    if v.shape[heads] != Hkv or v.shape[length] != Skv:
        raise ValueError(f"v has shape {list(v.shape)}, expected k's heads and length: {list(k.shape[:3])} and any last axis ({axes})")
    _check_heads(q, k, Hq, Hkv, D)
    window_size = checked_window(window_size)
    if attn_mask is not None:
        _check_mask(attn_mask, (B, Hq, Sq, Skv), q.device)
    return AttentionSpec(
        device=q.device.type, dtype=q.dtype, batch=B, q_heads=Hq, kv_heads=Hkv, q_len=Sq, kv_len=Skv, head_dim=D, v_head_dim=Dv,
        is_causal=_flag("is_causal", is_causal), scale=_scale(scale, D), window_size=window_size, softcap=_softcap(softcap),
        alibi=_check_slopes(alibi_slopes, B, Hq, q.device), mask=None if attn_mask is None else attn_mask.dtype,
        sinks=_check_sinks(sinks, Hq, q.device), return_lse=_flag("return_lse", return_lse), layout=layout, needs_grad=needs_grad,
        total_q=B * Sq, device_index=q.device.index,
    )


def varlen_spec(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k, is_causal, scale, window_size, softcap,
    alibi_slopes, sinks, return_lse, needs_grad,
):
    """The AttentionSpec of an attention_varlen() call, by shapes; check_lengths() looks at the values. Raises ValueError or TypeError."""
    _check_tensors(q, k, v)
    if q.dim() != 3:
        raise ValueError(f"q has shape {list(q.shape)}, expected packed tokens [Tq, Hq, D]")
    paged = block_table is not None
    axes = "pages [num_blocks, block_size, Hkv, D]" if paged else "packed tokens [Tk, Hkv, D]"
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != (4 if paged else 3):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {axes} ({'with' if paged else 'without'} block_table)")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"v has shape {list(v.shape)}, expected k's {list(k.shape[:-1])} and any last axis: {axes}")
    Hq, D, Hkv = q.shape[1], q.shape[2], k.shape[-2]
    _check_heads(q, k, Hq, Hkv, D)
    _check_index("cu_seqlens_q", cu_seqlens_q, q.device)
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] < 1:
        raise ValueError(f"cu_seqlens_q has shape {list(cu_seqlens_q.shape)}, expected [B+1] starting with 0")
    B = cu_seqlens_q.shape[0] - 1
    if paged:
        if seqused_k is None:
            raise ValueError("seqused_k is None, expected [B] int32 lengths with block_table")
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k was given with block_table; expected None: a paged cache's lengths are seqused_k")
        _check_index("block_table", block_table, q.device)
        _check_index("seqused_k", seqused_k, q.device)
        if block_table.dim() != 2 or block_table.shape[0] != B:
            raise ValueError(f"block_table has shape {list(block_table.shape)}, expected [B, max_blocks] with B = {B} (from cu_seqlens_q)")
        if seqused_k.shape != (B,):
            raise ValueError(f"seqused_k has shape {list(seqused_k.shape)}, expected [{B}] (B from cu_seqlens_q)")
        if k.shape[1] < 1:
            raise ValueError(f"k has shape {list(k.shape)}, expected {axes} with block_size of at least 1")
    else:
        if seqused_k is not None:
            raise ValueError("seqused_k was given without block_table; expected both or neither (cut k and v, or pass cu_seqlens_k)")
        if cu_seqlens_k is None:
            raise ValueError("cu_seqlens_k is None, expected [B+1] int32 (or block_table and seqused_k for a paged cache)")
        _check_index("cu_seqlens_k", cu_seqlens_k, q.device)
        if cu_seqlens_k.shape != cu_seqlens_q.shape:
            raise ValueError(f"cu_seqlens_k has shape {list(cu_seqlens_k.shape)}, expected cu_seqlens_q's {list(cu_seqlens_q.shape)}")
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} is {value!r}, expected an integer of at least 0")
    return AttentionSpec(
        device=q.device.type, dtype=q.dtype, batch=B, q_heads=Hq, kv_heads=Hkv, q_len=max_seqlen_q, kv_len=max_seqlen_k, head_dim=D,
        v_head_dim=v.shape[-1], is_causal=_flag("is_causal", is_causal), scale=_scale(scale, D), window_size=checked_window(window_size),
        softcap=_softcap(softcap), alibi=_check_slopes(alibi_slopes, B, Hq, q.device), sinks=_check_sinks(sinks, Hq, q.device),
        return_lse=_flag("return_lse", return_lse), needs_grad=needs_grad, varlen=True, total_q=q.shape[0],
        page_size=k.shape[1] if paged else 0, device_index=q.device.index,
    )


def check_lengths(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k) -> None:
    """The values of a varlen call's lengths, on CPU tensors. Raises ValueError."""
    _check_cumulative("cu_seqlens_q", cu_seqlens_q.tolist(), q.shape[0], "q", "max_seqlen_q", max_seqlen_q)
    if cu_seqlens_k is not None:
        _check_cumulative("cu_seqlens_k", cu_seqlens_k.tolist(), k.shape[0], "k", "max_seqlen_k", max_seqlen_k)
        return
    lengths = seqused_k.tolist()
    if not lengths:
        return
    pages, page_size, *_ = k.shape
    columns, longest = block_table.shape[1], max(lengths)
    if min(lengths) < 0 or longest > columns * page_size:
        raise ValueError(
            f"seqused_k has lengths from {min(lengths)} to {longest}, expected 0 to {columns * page_size}: block_table holds "
            f"{columns} pages of {page_size} tokens a sequence"
        )
    if longest > max_seqlen_k:
        raise ValueError(f"max_seqlen_k is {max_seqlen_k}, expected at least {longest}: the longest sequence of seqused_k")
    # Pages within a length must exist; ids beyond it are never read, so they may be anything. NumPy on the same memory: each torch
    # operation costs several times as much on tables this small; and seen as unsigned, a negative id is a large one.
    table = block_table.numpy().view(numpy.uint32)
    if table.size and table.max() >= pages and any((table[b, : -(-n // page_size)] >= pages).any() for b, n in enumerate(lengths)):
        raise ValueError(f"block_table names a page outside 0..{pages - 1} within a sequence's length (seqused_k)")


def _check_cumulative(name: str, starts: list[int], total: int, packed: str, max_name: str, max_length: int) -> None:
    longest, previous = 0, starts[0]
    for start in starts[1:]:
        if start < previous:
            raise ValueError(f"{name} is {_short(starts)}, expected values that never fall (cumulative lengths)")
        if start - previous > longest:
            longest = start - previous
        previous = start
    if starts[0] != 0 or previous != total:
        raise ValueError(f"{name} runs from {starts[0]} to {previous}, expected 0 to {total}: the tokens that {packed} packs")
    if longest > max_length:
        raise ValueError(f"{max_name} is {max_length}, expected at least {longest}: the longest sequence of {name}")


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:10]))}, ... {len(values)} values]"


def _check_tensors(q, k, v) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}, expected a torch.Tensor")
    if q.dtype not in FLOAT_DTYPES:
        raise TypeError(f"q has dtype {dtype_name(q.dtype)}, expected one of {', '.join(map(dtype_name, FLOAT_DTYPES))}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {dtype_name(tensor.dtype)}, expected q's {dtype_name(q.dtype)}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, expected q's device {q.device}")


def _check_heads(q, k, Hq: int, Hkv: int, D: int) -> None:
    if k.shape[-1] != D:
        raise ValueError(f"k has shape {list(k.shape)}: last axis {k.shape[-1]}, expected q's head dimension {D}")
    if D == 0:
        raise ValueError(f"q has shape {list(q.shape)}, expected a head dimension of at least 1")
    if Hkv == 0 or Hq == 0 or Hq % Hkv:
        raise ValueError(f"q has {Hq} heads and k has {Hkv}: expected the query heads to be a multiple of the key/value heads (GQA)")


def _check_index(name: str, tensor, device: torch.device) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}, expected an int32 torch.Tensor")
    if tensor.dtype not in INT32:
        raise TypeError(f"{name} has dtype {dtype_name(tensor.dtype)}, expected int32")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected q's device {device}")


def _check_mask(mask, shape: tuple[int, int, int, int], device: torch.device) -> None:
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attn_mask is {type(mask).__name__}, expected a torch.Tensor")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"attn_mask has dtype {dtype_name(mask.dtype)}, expected bool (True = attend) or a float that is added")
    if mask.device != device:
        raise ValueError(f"attn_mask is on {mask.device}, expected q's device {device}")
    own = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if mask.dim() > 4 or any(size not in (1, full) for size, full in zip(own, shape)):
        raise ValueError(f"attn_mask has shape {list(mask.shape)}, expected one that broadcasts to [B, Hq, Sq, Skv] = {list(shape)}")


def _check_slopes(slopes, B: int, Hq: int, device: torch.device) -> int:
    if slopes is None:
        return 0
    if not isinstance(slopes, torch.Tensor):
        raise TypeError(f"alibi_slopes is {type(slopes).__name__}, expected a float32 torch.Tensor [Hq] or [B, Hq]")
    if slopes.dtype != torch.float32:
        raise TypeError(f"alibi_slopes has dtype {dtype_name(slopes.dtype)}, expected float32")
    if tuple(slopes.shape) not in ((Hq,), (B, Hq)):
        raise ValueError(f"alibi_slopes has shape {list(slopes.shape)}, expected [Hq] = [{Hq}] or [B, Hq] = [{B}, {Hq}]")
    if slopes.device != device:
        raise ValueError(f"alibi_slopes is on {slopes.device}, expected q's device {device}")
    return slopes.dim()


def _check_sinks(sinks, Hq: int, device: torch.device) -> bool:
    if sinks is None:
        return False
    if not isinstance(sinks, torch.Tensor):
        raise TypeError(f"sinks is {type(sinks).__name__}, expected a float torch.Tensor [Hq]")
    if not sinks.dtype.is_floating_point:
        raise TypeError(f"sinks has dtype {dtype_name(sinks.dtype)}, expected a float dtype")
    if tuple(sinks.shape) != (Hq,):
        raise ValueError(f"sinks has shape {list(sinks.shape)}, expected [Hq] = [{Hq}]: one extra logit a query head")
    if sinks.device != device:
        raise ValueError(f"sinks is on {sinks.device}, expected q's device {device}")
    return True


def checked_window(window_size) -> tuple[int, int]:
    """(left, right) as two ints of at least -1, and at most FARTHEST. Raises ValueError."""
    try:
        left, right = window_size
        left, right = operator.index(left), operator.index(right)       # not int(), which would take 2.7 and '3'
    except (TypeError, ValueError):
        raise ValueError(f"window_size is {window_size!r}, expected two integers (left, right), -1 = unlimited") from None
    if left < -1 or right < -1:
        raise ValueError(f"window_size is {(left, right)}, expected each of (left, right) to be -1 (unlimited) or at least 0")
    return min(left, FARTHEST), min(right, FARTHEST)


def _softcap(softcap) -> float:
    if softcap is None:
        return 0.0
    if not _is_finite_number(softcap) or softcap < 0:
        raise ValueError(f"softcap is {softcap!r}, expected a number of at least 0 (None or 0 = off)")
    return float(softcap)


def _scale(scale, D: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(D)
    if not _is_finite_number(scale):
        raise ValueError(f"scale is {scale!r}, expected a finite number or None for 1/sqrt(head_dim)")
    return float(scale)


def _is_finite_number(value) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:                               # an int that no float holds
        return False


def _flag(name: str, value) -> bool:
    if value is not True and value is not False:
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return value
