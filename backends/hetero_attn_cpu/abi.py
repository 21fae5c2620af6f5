"""The Python twin of csrc/cpu/abi.h: its structs as struct formats, packed in one step.

A call's struct is made anew for every call, so what matters is that one struct.pack costs a microsecond where setting forty ctypes fields
costs ten. Every field is naturally aligned and there is no padding, so '=' formats describe the C layout exactly; tests/test_cpu_abi.py
compares fields, offsets and sizes with abi.h and with what a built object says of itself.
"""

from __future__ import annotations

import struct

import torch

ABI_VERSION = 2                                      # abi.h's
DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}                     # HaDtype of q, k, v and out; x, weight, bias and y
MASK_DTYPES = {**DTYPES, torch.bool: 4, torch.float64: 5}
STATUS = {1: "it was built for another ABI version", 2: "out of memory", 3: "unknown dtype"}

# (name, C type, how many), in abi.h's order. A pointer is an address, or 0 for null.
ATTENTION = (
    ("abi_version", "int32", 1), ("dtype", "int32", 1), ("batch", "int32", 1), ("q_heads", "int32", 1), ("kv_heads", "int32", 1),
    ("head_dim", "int32", 1), ("v_head_dim", "int32", 1), ("threads", "int32", 1),
    ("q_len", "int64", 1), ("kv_len", "int64", 1),
    ("q", "pointer", 1), ("k", "pointer", 1), ("v", "pointer", 1), ("out", "pointer", 1), ("lse", "pointer", 1),
    ("q_stride", "int64", 4), ("out_stride", "int64", 4), ("k_stride", "int64", 4), ("v_stride", "int64", 4), ("lse_stride", "int64", 3),
    ("mask", "pointer", 1), ("mask_dtype", "int32", 1), ("alibi", "int32", 1), ("mask_stride", "int64", 4),
    ("slopes", "pointer", 1), ("slopes_stride", "int64", 2), ("sinks", "pointer", 1),
    ("scale", "float", 1), ("softcap", "float", 1), ("left", "int64", 1), ("right", "int64", 1),
    ("cu_q", "pointer", 1), ("cu_k", "pointer", 1), ("block_table", "pointer", 1), ("seqused_k", "pointer", 1),
    ("table_stride", "int64", 1), ("page_size", "int64", 1), ("parallel", "pointer", 1),
)
LINEAR = (
    ("abi_version", "int32", 1), ("dtype", "int32", 1), ("threads", "int32", 1), ("reserved", "int32", 1),
    ("m", "int64", 1), ("n", "int64", 1), ("k", "int64", 1),
    ("x", "pointer", 1), ("weight", "pointer", 1), ("bias", "pointer", 1), ("y", "pointer", 1),
    ("x_stride", "int64", 1), ("weight_stride", "int64", 1), ("y_stride", "int64", 1), ("parallel", "pointer", 1),
)
NORM = (
    ("abi_version", "int32", 1), ("dtype", "int32", 1), ("threads", "int32", 1), ("reserved", "int32", 1),
    ("rows", "int64", 1), ("channels", "int64", 1), ("x_stride", "int64", 1),
    ("x", "pointer", 1), ("weight", "pointer", 1), ("y", "pointer", 1),
    ("eps", "float", 1), ("offset", "float", 1), ("parallel", "pointer", 1),
)
_CODES = {"int32": "i", "int64": "q", "float": "f", "pointer": "Q"}


def format_of(fields: tuple[tuple[str, str, int], ...]) -> str:
    """The struct module's format of a table of fields."""
    return "=" + "".join(f"{count}{_CODES[kind]}" for _, kind, count in fields)


_attention = struct.Struct(format_of(ATTENTION))
_linear = struct.Struct(format_of(LINEAR))
_norm = struct.Struct(format_of(NORM))
pack_attention = _attention.pack                     # the values of ATTENTION's fields, arrays spread -> bytes
pack_linear = _linear.pack
pack_norm = _norm.pack
ATTENTION_BYTES, LINEAR_BYTES, NORM_BYTES = _attention.size, _linear.size, _norm.size


def fields_of(fields: tuple[tuple[str, str, int], ...], packed: bytes) -> dict[str, int | float | list]:
    """A packed struct by field name; arrays as lists. For tests and for running a call somewhere else."""
    values, found = list(struct.unpack(format_of(fields), packed)), {}
    for name, _, count in fields:
        found[name] = values.pop(0) if count == 1 else [values.pop(0) for _ in range(count)]
    return found


def repacked(fields: tuple[tuple[str, str, int], ...], values: dict[str, int | float | list]) -> bytes:
    """The inverse of fields_of."""
    spread = [value for name, _, count in fields for value in ([values[name]] if count == 1 else values[name])]
    return struct.pack(format_of(fields), *spread)
