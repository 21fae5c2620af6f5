"""Tensors to packed structs, and the calls: what Python adds to every kernel call, kept to a few microseconds.

q, k and v go as they lie, by their strides: nothing of their size is ever copied. Only the small operands are brought into the form that
the kernels read (int32 tables contiguous, sinks in fp32).
"""

from __future__ import annotations

import math

import torch

from hetero_attn.spec import AttentionSpec, Operands
from hetero_attn_cpu import abi
from hetero_attn_cpu.library import Library

_empty, _threads = torch.empty, torch.get_num_threads
_pack, _VERSION, _DTYPES = abi.pack_attention, abi.ABI_VERSION, abi.DTYPES
_CPU = torch.device("cpu")                           # said aloud: torch.set_default_device() may say otherwise
_NO_OPERANDS = (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)     # mask, mask_dtype, alibi, mask_stride [4], slopes, slopes_stride [2], sinks
SMALLEST, LARGEST = 2.0**-126, 3.4028234663852886e38  # fp32's: what a cap below (0 would switch it off), a scale or a cap beyond becomes


def attention(
    library: Library, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, operands: Operands
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Backend.attention() on `library`: shapes as there. out is dense in the layout the caller holds; lse is contiguous.

    Raises MemoryError.
    """
    if q.is_neg() or k.is_neg() or v.is_neg():       # lazily negated views: their memory holds the other sign
        q, k, v = q.resolve_neg(), k.resolve_neg(), v.resolve_neg()
    if spec.varlen:
        return _varlen(library, q, k, v, spec, operands)
    B, Hq, Sq, D = q.shape
    _, Hkv, Skv, Dv = v.shape
    if spec.layout == "bshd":
        out = _empty((B, Sq, Hq, Dv), dtype=q.dtype, device=_CPU)
        out_stride, out = (Sq * Hq * Dv, Dv, Hq * Dv, 1), out.transpose(1, 2)
    else:
        out = _empty((B, Hq, Sq, Dv), dtype=q.dtype, device=_CPU)
        out_stride = (Hq * Sq * Dv, Sq * Dv, Dv, 1)
    lse = _empty((B, Hq, Sq), dtype=torch.float32, device=_CPU) if spec.return_lse else None
    plain = operands.attn_mask is None and operands.alibi_slopes is None and operands.sinks is None
    kept, values = (None, _NO_OPERANDS) if plain else _operands(operands)
    left, right = spec.window_size
    if spec.is_causal:
        right = 0
    library.attention(_pack(
        _VERSION, _DTYPES[q.dtype], B, Hq, Hkv, D, Dv, _threads(), Sq, Skv,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr(),
        *q.stride(), *out_stride, *k.stride(), *v.stride(), Hq * Sq, Sq, 1,
        *values, *_scalars(spec), left, right, 0, 0, 0, 0, 0, 0, library.parallel,
    ))
    del kept                                         # alive until the call is over
    return out, lse


def _varlen(library: Library, q, k, v, spec: AttentionSpec, operands: Operands):
    (Tq, Hq, D), (Hkv, Dv) = q.shape, v.shape[-2:]
    out = _empty((Tq, Hq, Dv), dtype=q.dtype, device=_CPU)
    lse = _empty((Hq, Tq), dtype=torch.float32, device=_CPU) if spec.return_lse else None
    plain = operands.alibi_slopes is None and operands.sinks is None
    kept, values = (None, _NO_OPERANDS) if plain else _operands(operands)
    q_token, q_head, q_element = q.stride()
    cu_q = operands.cu_seqlens_q.contiguous()
    if spec.page_size:
        k_page, k_token, k_head, k_element = k.stride()
        v_page, v_token, v_head, v_element = v.stride()
        lengths, table = operands.seqused_k.contiguous(), operands.block_table
        table = table if table.stride(1) == 1 else table.contiguous()
        indices = (cu_q.data_ptr(), 0, table.data_ptr(), lengths.data_ptr(), table.stride(0), spec.page_size)
    else:
        (k_token, k_head, k_element), (v_token, v_head, v_element), k_page, v_page = k.stride(), v.stride(), 0, 0
        table, lengths = None, operands.cu_seqlens_k.contiguous()
        indices = (cu_q.data_ptr(), lengths.data_ptr(), 0, 0, 0, 0)
    left, right = spec.window_size
    if spec.is_causal:
        right = 0
    library.attention(_pack(
        _VERSION, _DTYPES[q.dtype], cu_q.shape[0] - 1, Hq, Hkv, D, Dv, _threads(), spec.q_len, spec.kv_len,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr(),
        0, q_head, q_token, q_element, 0, Dv, Hq * Dv, 1, k_page, k_head, k_token, k_element, v_page, v_head, v_token, v_element, 0, Tq, 1,
        *values, *_scalars(spec), left, right, *indices, library.parallel,
    ))
    del kept, table, lengths
    return out, lse


def _operands(operands: Operands) -> tuple[list, tuple]:
    """Mask, slopes and sinks as the struct's fields, and the tensors they point into. A broadcast axis gets stride 0."""
    mask, slopes, sinks = operands.attn_mask, operands.alibi_slopes, operands.sinks
    mask_fields, slopes_fields, sinks_field = (0, 0, 0, 0, 0, 0), (0, 0, 0), 0
    if mask is not None:
        if mask.dtype not in abi.MASK_DTYPES or mask.is_neg():                 # 8-bit floats: rare, and exact in fp32
            mask = mask.to(torch.float32).resolve_neg()
        strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride())]
        mask_fields = (mask.data_ptr(), abi.MASK_DTYPES[mask.dtype], *strides)
    if slopes is not None:
        slopes = slopes.resolve_neg()
        slopes_fields = (slopes.data_ptr(), *(slopes.stride() if slopes.dim() == 2 else (0, slopes.stride(0))))
    if sinks is not None:
        sinks = sinks.to(torch.float32).resolve_neg().contiguous()
        sinks_field = sinks.data_ptr()
    alibi = int(slopes is not None)
    return [mask, slopes, sinks], (*mask_fields[:2], alibi, *mask_fields[2:], *slopes_fields, sinks_field)


def _scalars(spec: AttentionSpec) -> tuple[float, float]:
    """scale and softcap as fp32 holds them: struct refuses what is beyond its range."""
    scale, softcap = spec.scale, spec.softcap
    if -LARGEST <= scale <= LARGEST and (softcap == 0 or SMALLEST <= softcap <= LARGEST):
        return scale, softcap
    return math.copysign(min(abs(scale), LARGEST), scale), softcap and min(max(softcap, SMALLEST), LARGEST)


def linear(library: Library, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """x [M, K], weight [N, K], bias [N] contiguous, into out [M, N]: one dtype of abi.DTYPES, on the CPU, unit stride along rows.

    Raises MemoryError.
    """
    library.linear(abi.pack_linear(
        _VERSION, _DTYPES[x.dtype], _threads(), 0, out.shape[0], out.shape[1], x.shape[1],
        x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(),
        x.stride(0), weight.stride(0), out.stride(0), library.parallel,
    ))


def rms_norm(library: Library, x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
    """x [rows, channels] with unit stride along channels, weight [channels] contiguous, one dtype of abi.DTYPES -> [rows, channels].

    Raises MemoryError.
    """
    y = _empty(x.shape, dtype=x.dtype, device=_CPU)
    library.rms_norm(abi.pack_norm(
        _VERSION, _DTYPES[x.dtype], _threads(), 0, x.shape[0], x.shape[1], x.stride(0), x.data_ptr(), weight.data_ptr(), y.data_ptr(),
        eps, weight_offset, library.parallel,
    ))
    return y
