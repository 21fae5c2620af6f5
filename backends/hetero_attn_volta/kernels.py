"""The kernels as sources with their definitions, and as cubins: one list for launching, `hetero-attn build` and the tests."""

from __future__ import annotations

from functools import cache

from hetero_attn.cubin import Cubin, KernelSource
from hetero_attn_volta.tiling import VARIANTS, Variant

COMBINE = KernelSource("volta/combine.cu", "volta_combine", "combine")
COMBINE_ROWS = 4                       # rows of a block of 128 threads


@cache
def source_of(variant: Variant) -> KernelSource:
    """A variant's kernel."""
    return KernelSource(f"volta/{variant.kernel}.cu", f"volta_{variant.kernel}", variant.name, tuple(variant.defines().items()))


def sources() -> list[KernelSource]:
    """Every kernel that may be launched."""
    return [*(source_of(variant) for variant in VARIANTS), COMBINE]


def cubins(arch: str, *, used_here: bool = False) -> list[Cubin]:
    """Every kernel as a cubin for an architecture such as 'sm_70'."""
    return [source.cubin(arch, used_here=used_here) for source in sources()]
