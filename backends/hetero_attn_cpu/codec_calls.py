"""The Python twin of csrc/cpu/codec.h: packing and unpacking of low-bit payloads as Backend.codec_kernels() describes them.

Plain integers and addresses; the bytes are those of the definition in hetero_attn/collectives/codec. Long tensors are cut for torch's
number of threads only by whoever calls: one call, one thread.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_p, _i, _n = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
FUNCTIONS = {                                        # name -> (result, arguments)
    "pack_groups": (_n, (_p, _i, _n, _i, _p)),
    "unpack_groups": (None, (_p, _n, _i, _p, _i)),
    "pack_features": (_n, (_p, _i, _n, _n, _n, _n, _p, _p, _p, _n, _n, _p)),
    "unpack_features": (None, (_p, _n, _n, _n, _n, _p, _p, _p, _n, _n, _p, _i)),
}


class CodecCalls:
    """The codec's functions of a loaded object, taking contiguous CPU tensors whose sizes the caller has seen to."""

    def __init__(self, object_: ctypes.CDLL) -> None:
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(object_, f"hetero_attn_cpu_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, f"_{name}", function)

    def pack_groups(self, values: torch.Tensor, bits: int, body: torch.Tensor) -> bool:
        """values [n] of fp32, bf16 or fp16 -> body; False where one is not finite."""
        return self._pack_groups(values.data_ptr(), DTYPES[values.dtype], values.numel(), bits, body.data_ptr()) >= 0

    def unpack_groups(self, body: torch.Tensor, bits: int, out: torch.Tensor, accumulate: bool) -> None:
        """body -> out fp32 [n], written or added to."""
        self._unpack_groups(body.data_ptr(), out.numel(), bits, out.data_ptr(), accumulate)

    def pack_features(self, values: torch.Tensor, first: int, table: Any, body: torch.Tensor) -> int:
        """values [n] -> body; how many saturated, -1 where one is not finite."""
        count = values.numel()
        return self._pack_features(
            values.data_ptr(), DTYPES[values.dtype], first, count, table.features, table.outliers.numel(), table.scale.data_ptr(),
            table.mean.data_ptr(), table.outliers.data_ptr(), table.outliers_in(first, count), table.rows_in(first, count), body.data_ptr(),
        )

    def unpack_features(self, body: torch.Tensor, first: int, table: Any, out: torch.Tensor, accumulate: bool) -> None:
        """body -> out fp32 [n], written or added to."""
        count = out.numel()
        self._unpack_features(
            body.data_ptr(), first, count, table.features, table.outliers.numel(), table.step.data_ptr(), table.mean.data_ptr(),
            table.outliers.data_ptr(), table.outliers_in(first, count), table.rows_in(first, count), out.data_ptr(), accumulate,
        )
