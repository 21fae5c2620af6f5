"""Which way a call goes and how it is launched: pure arithmetic on what every rank knows alike.

Ranks must come to the same verdict or they wait for one another, so nothing here looks at what a rank has for itself: where its tensor
lies, how full its heap is. That is settled in the kernel, where the ranks tell each other their offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch

from hetero_attn.communicator import shard_counts
from hetero_attn.spec import dtype_name
from hetero_attn_hopper.abi import KINDS, MAX_CTAS, UNIT
from hetero_attn_hopper.layout import Layout

MIN_CTAS = 2
DEFAULT_CTAS = 16                      # TokenWeave's sweep: 16 are the fastest, one an SM, where nothing is computed beside them
OVERLAPPED_CTAS = 8                    # and 8 cost 1.12 to 1.15 of that, where the rest of the device computes
ONE_SHOT_CTAS = 8
MAX_THREADS, NORM_THREADS, WARP = 512, 1024, 32
SHARED_BYTES = {(7, 0): 96 << 10, (7, 5): 64 << 10, (8, 0): 163 << 10, (8, 6): 99 << 10, (8, 7): 163 << 10, (8, 9): 99 << 10,
                (9, 0): 227 << 10, (10, 0): 227 << 10}               # CUDA C++ Programming Guide: most shared memory of a block
STATIC_SHARED_BYTES = 1024             # sums and offsets of the fused kernel, rounded up


@dataclass(frozen=True)
class Launch:
    """Blocks, threads of a block and dynamic shared memory, the same on every rank."""

    ctas: int
    threads: int
    shared_bytes: int = 0


def ctas_reason(name: str, ctas: int) -> str | None:
    """Why a number of CTAs cannot be; None = it can."""
    if MIN_CTAS <= ctas <= MAX_CTAS:
        return None
    return f"{name} is {ctas}, the kernels take {MIN_CTAS} to {MAX_CTAS} CTAs"


def sum_objections(dtype: torch.dtype, nbytes: int, layout: Layout) -> list[str]:
    """Why a sum of so many bytes a rank is not made by these kernels; [] = it is."""
    objections = []
    if dtype not in KINDS:
        objections.append(f"dtype is {dtype_name(dtype)}, the kernels sum float32, bfloat16 and float16")
    return objections + move_objections(nbytes, layout)


def move_objections(nbytes: int, layout: Layout) -> list[str]:
    """The same of a call that only moves bytes."""
    if not nbytes:
        return ["nothing is to be sent"]
    if nbytes > layout.room:
        return [f"the tensor has {nbytes / 2**20:.1f} MiB, the symmetric room for one holds {layout.room / 2**20:.1f}; raise "
                "symmetric_room_bytes"]
    return []


def norm_objections(
    x: torch.dtype, residual: torch.dtype, weights: Sequence[torch.dtype], shape: tuple[int, int], layout: Layout, shared_bytes: int
) -> list[str]:
    """Why all_reduce_rms_norm of x [T, C] is not one kernel; [] = it is. shared_bytes: the most that a block of the device may have."""
    T, C = shape
    objections = sum_objections(x, T * C * x.itemsize, layout)
    if residual not in KINDS:
        objections.append(f"residual is {dtype_name(residual)}, the kernel has float32, bfloat16 and float16")
    if wide := [each for each in weights if each not in KINDS]:
        objections.append(f"a norm's weight is {dtype_name(wide[0])}, the kernel has float32, bfloat16 and float16")
    if C % UNIT:
        objections.append(f"rows have {C} channels, the kernel takes multiples of {UNIT}")
    if 4 * C + STATIC_SHARED_BYTES > shared_bytes:
        objections.append(f"rows have {C} channels, the kernel holds a row in shared memory: up to "
                          f"{(shared_bytes - STATIC_SHARED_BYTES) // 4 // UNIT * UNIT}")
    return objections


def norm_launch(T: int, C: int, world_size: int, ctas: int) -> Launch:
    """A row a CTA at a time; no more CTAs than the busiest rank has rows."""
    threads = min(NORM_THREADS, _warps(C // UNIT))
    return Launch(min(ctas, ceil(T / world_size)), threads, 4 * C)


def flat_launch(units: int, ctas: int) -> Launch:
    """So many units of the busiest rank, over the threads of all CTAs."""
    threads = min(MAX_THREADS, _warps(ceil(units / ctas)))
    return Launch(max(1, min(ctas, ceil(units / threads))), threads)


def one_shot_launch(units: int, ctas: int) -> Launch:
    """Always as many CTAs, so that all of them are at the same turn of the staging buffers (csrc/hopper/collectives.cu)."""
    return Launch(ctas, min(MAX_THREADS, _warps(ceil(units / ctas))))


def units_of(elements: int) -> int:
    return ceil(elements / UNIT)


def is_one_shot(units: int, dtype: torch.dtype, layout: Layout) -> bool:
    """Whether an all-reduce is one exchange of everything: what fits a staging buffer is (layout.stage is made the bound)."""
    return units * UNIT * dtype.itemsize <= layout.stage


def padded_shards(rows: int, row_elements: int, world_size: int) -> tuple[list[int], list[int]]:
    """(first unit, units) of every rank's rows: where they lie in x when rows are whole units, else each shard begins a unit of its own."""
    counts = shard_counts(world_size, rows)
    units = [units_of(count * row_elements) for count in counts]
    return [sum(units[:rank]) for rank in range(world_size)], units


def _warps(threads: int) -> int:
    return max(WARP, ceil(threads / WARP) * WARP)
