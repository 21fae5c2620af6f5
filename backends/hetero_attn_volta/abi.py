"""The Python twin of csrc/volta/call.h: one call as bytes, which the kernels get by value.

Every field is naturally aligned and there is no padding, so a '=' format describes the C layout exactly; tests/test_volta_abi.py compares
fields, order and sizes with call.h.
"""

from __future__ import annotations

import struct

import torch

MASK_KINDS = {None: 0, torch.bool: 1, torch.float16: 2, torch.float32: 3}          # call.h's MASK_...

# (name, C type, how many), in call.h's order. A pointer is an address, or 0 for null.
CALL = (
    *((name, "pointer", 1) for name in ("q", "k", "v", "out", "lse", "mask", "slopes", "sinks", "cu_q", "cu_k", "table", "lengths",
                                        "partial_out", "partial_rows")),
    *((name, "int64", 4) for name in ("q_stride", "k_stride", "v_stride", "out_stride", "mask_stride")),
    ("lse_stride", "int64", 2), ("slopes_stride", "int64", 2), ("table_stride", "int64", 1), ("total_q", "int64", 1),
    *((name, "int32", 1) for name in (
        "batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "v_head_dim", "page_size", "left", "right",
        "mask_kind", "first_batch", "splits", "partial_dim", "vector_q", "vector_k", "vector_v", "vector_out")),
    ("scale", "float", 1), ("softcap", "float", 1),
)
_CODES = {"int32": "i", "int64": "q", "float": "f", "pointer": "Q"}
_call = struct.Struct("=" + "".join(f"{count}{_CODES[kind]}" for _, kind, count in CALL))
CALL_BYTES = _call.size


_EMPTY = {name: 0 if count == 1 else (0,) * count for name, _, count in CALL}
_MANY = tuple(count > 1 for _, _, count in CALL)


def pack(values: dict[str, int | float | tuple[int, ...]]) -> bytes:
    """Field name -> value (a tuple where there are several) as a Call; a field that is not named is 0."""
    filled = _EMPTY | values
    if len(filled) > len(CALL):
        raise ValueError(f"call has fields {sorted(values.keys() - _EMPTY.keys())}, expected those of csrc/volta/call.h")
    spread: list[int | float] = []
    for value, many in zip(filled.values(), _MANY):
        if many:
            spread += value
        else:
            spread.append(value)
    return _call.pack(*spread)
