"""The Python twin of csrc/cpu/shared_memory.h: its functions with their argument types, and what its codes mean.

Plain integers and addresses, one ctypes call a collective: that call is half of what a small all-reduce costs from Python.
"""

from __future__ import annotations

import ctypes

import torch

GAVE_UP, OUT_OF_STEP, REFUSED = -1, -2, -3
# HaDtype and HaSummable. Complex numbers are summed as pairs.
SUMMABLE = {
    torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.float64: 5, torch.uint8: 8, torch.int8: 9, torch.int16: 10,
    torch.int32: 11, torch.int64: 12,
}
NORM = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
WAITING = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64)

_p, _i, _n, _d = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double
FUNCTIONS = {                                        # name -> (result, arguments)
    "group_open": (_p, (_i, _i, _n, _n, _i, WAITING)),
    "group_close": (None, (_p,)),
    "group_add": (ctypes.c_int, (_p, _p, _n)),
    "group_reserved": (_n, (_n,)),
    "group_odd": (_i, (_p,)),
    "all_reduce": (_n, (_p, _p, _n, _i, _n)),
    "reduce_scatter": (_n, (_p, _p, _p, _n, _n, _i, _n)),
    "all_gather": (_n, (_p, _p, _p, _p, _n, _n)),
    "broadcast": (_n, (_p, _p, _n, _i, _n)),
    "barrier": (_n, (_p, _n)),
    "all_reduce_rms_norm": (_n, (_p, _p, _p, _n, _n, _i, _p, _i, _p, _i, _p, _i, _d, _d, _n)),
}


class SharedCalls:
    """The functions of a loaded object, one attribute each."""

    def __init__(self, object_: ctypes.CDLL) -> None:
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(object_, f"hetero_attn_cpu_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)


def group_add(calls: SharedCalls, group: int, addresses: list[int], size: int) -> bool:
    """Tell the group of one more segment of every rank; False when it has as many as it can."""
    return not calls.group_add(group, (ctypes.c_uint64 * len(addresses))(*addresses), size)
