"""The kernels as sources with their definitions, and as cubins: one list for launching, `hetero-attn build` and the tests."""

from __future__ import annotations

from functools import cache

import torch

from hetero_attn.cubin import Cubin, KernelSource
from hetero_attn_hopper.abi import KINDS

MULTIMEM, UNICAST = "multimem", "unicast"
DOORS = (MULTIMEM, UNICAST)
FUSED, PLAIN = "all_reduce_rms_norm", "collectives"
FUNCTIONS = {
    "all_reduce_rms_norm": FUSED, "all_reduce": PLAIN, "reduce_scatter": PLAIN, "all_gather": PLAIN, "one_shot": PLAIN,
}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@cache
def source_of(operation: str, dtype: torch.dtype, door: str) -> KernelSource:
    """The kernel of an operation (FUNCTIONS) on fp32, bf16 or fp16, by a door (DOORS)."""
    file = FUNCTIONS[operation]
    defines = (("X_KIND", KINDS[dtype]), *((("MULTIMEM", 1),) if door == MULTIMEM else ()))
    return KernelSource(f"hopper/{file}.cu", f"hopper_{operation}", f"{file}-{NAMES[dtype]}-{door}", defines)


def sources(door: str) -> list[KernelSource]:
    """Every kernel that a communicator may launch by a door."""
    return [source_of(operation, dtype, door) for operation in FUNCTIONS for dtype in KINDS]


def cubins(arch: str, *, used_here: bool = False) -> list[Cubin]:
    """Every file in every dtype by every door that an architecture has: multimem from sm_90 on."""
    doors = DOORS if int(arch.removeprefix("sm_").rstrip("af")) >= 90 else (UNICAST,)
    files = {(kernel.name): kernel for door in doors for kernel in sources(door)}
    return [kernel.cubin(arch, used_here=used_here) for kernel in files.values()]
