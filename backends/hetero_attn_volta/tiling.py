"""Which kernel variant runs a call, with how many blocks and splits: pure arithmetic on the spec and the profile's numbers.

A variant promises how many of its blocks share a multiprocessor; shared memory and registers must allow it (`occupancy`), and the tests
compile every variant and hold ptxas to the promise. Volta: 96 KB of shared memory a multiprocessor, all of which one block may take.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Protocol

from hetero_attn.spec import AttentionSpec
from hetero_attn_volta.relayout import PAD

MAX_HEAD_DIM = 256
REGISTERS, MAX_REGISTERS, WARPS_PER_UNIT = 65536, 255, 64         # CUDA C++ Programming Guide, compute capability 7.0
REGISTER_STEP = 8                                                  # a thread's registers are given out in eights
TENSOR_FMA_PER_CLOCK = 512         # NVIDIA V100 whitepaper: 8 tensor cores a multiprocessor, 64 FMA each
SHARED_BYTES_PER_CLOCK = 128       # 32 banks of 4 bytes
DECODE_ROWS = 16                   # query rows (positions x heads of a group) of a decode block
DECODE_MAX_QUERIES = 16            # up to so many the decode kernel reads K and V no oftener than the forward kernel, which does so a head
MAX_SPLITS = 64


class Hardware(Protocol):
    """What is used of a profile's `hardware`."""

    units: int | None
    shared_memory_bytes: int | None


@dataclass(frozen=True)
class Variant:
    """One compiled kernel. keys: of a tile; row_tiles: of 16 queries a warp; blocks: that are promised to share a multiprocessor.

    one_buffer: K and V take turns in one tile. parts: in which a tile passes through the registers.
    """

    kernel: str                        # forward, decode
    head_dim: int                      # padded
    keys: int
    warps: int
    row_tiles: int
    q_in_registers: bool
    one_buffer: bool
    parts: int
    blocks: int

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def queries(self) -> int:
        """Query rows of a block."""
        return 16 * self.row_tiles * (self.warps if self.kernel == "forward" else 1)

    @property
    def regions(self) -> dict[str, tuple[int, int]]:
        """Name -> (begin, end) bytes of the first warp's shared memory: K, V, P (weights) and bad (keys whose values are not finite)."""
        tile, weights = 2 * self.keys * (self.head_dim + PAD), 2 * 16 * (self.keys + PAD) * self.row_tiles
        values = 0 if self.one_buffer else tile
        warps = self.warps if self.kernel == "forward" else 1
        weights_end = values + tile + warps * weights
        return {"K": (0, tile), "V": (values, values + tile), "P": (values + tile, weights_end),
                "bad": (weights_end, weights_end + 8 * ceil(self.keys / 32))}

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block (the map is at the head of forward.cu and decode.cu)."""
        end, row = self.regions["bad"][1], 2 * (self.head_dim + PAD)
        if self.kernel == "forward":
            queries = self.queries * row
            return max(end, queries) if self.q_in_registers else end + queries
        merged = 4 * (3 * 16 * self.warps + 16 * (self.head_dim + 8))
        return max(self.warps * end + 16 * row, merged)

    @property
    def register_bound(self) -> int:
        """The most registers a thread may use for the promised blocks to fit."""
        return min(MAX_REGISTERS, REGISTERS // (self.threads * self.blocks) // REGISTER_STEP * REGISTER_STEP)

    def defines(self) -> dict[str, int]:
        """The preprocessor's definitions."""
        return {"HEAD_DIM": self.head_dim, "KEYS": self.keys, "WARPS": self.warps, "ROW_TILES": self.row_tiles,
                "Q_IN_REGISTERS": int(self.q_in_registers), "ONE_BUFFER": int(self.one_buffer), "PARTS": self.parts, "BLOCKS": self.blocks}

    @property
    def name(self) -> str:
        return f"{self.kernel}-d{self.head_dim}-q{self.queries}-k{self.keys}"


def occupancy(variant: Variant, hardware: Hardware, registers: int | None = None) -> int:
    """Blocks that share a multiprocessor; registers: a thread's, None = as many as are promised."""
    return _occupancy(variant, hardware.shared_memory_bytes or 0, registers or variant.register_bound)


def _occupancy(variant: Variant, shared_memory_bytes: int, registers: int) -> int:
    given = ceil(registers / REGISTER_STEP) * REGISTER_STEP
    return min(shared_memory_bytes // variant.shared_bytes, REGISTERS // (given * variant.threads), WARPS_PER_UNIT // variant.warps)


# What compiles for sm_70 without a spill, by ptxas 12.9. Row tiles of 2 read K and V half as often; they need the registers that a head
# dimension of 64 leaves, or at 128 that Q and one tile for K and V leave (just: 255), where eight warps are one block with all of the
# shared memory. From 192 on, eight warps share the tiles, because only one block fits.
FORWARD = (
    Variant("forward", 32, 64, 4, 1, True, False, 1, 3),
    Variant("forward", 64, 64, 4, 1, True, False, 1, 2),
    Variant("forward", 64, 32, 4, 2, True, False, 1, 2),
    Variant("forward", 96, 64, 4, 1, True, False, 1, 2),
    Variant("forward", 128, 32, 4, 1, True, False, 1, 2),
    Variant("forward", 128, 32, 8, 2, False, True, 1, 1),
    Variant("forward", 192, 32, 8, 1, False, False, 1, 1),
    Variant("forward", 256, 32, 8, 1, False, True, 2, 1),
)
DECODE = (
    Variant("decode", 32, 32, 4, 1, True, False, 1, 2),
    Variant("decode", 64, 32, 4, 1, True, False, 1, 2),
    Variant("decode", 96, 32, 4, 1, False, True, 1, 2),
    Variant("decode", 128, 32, 4, 1, False, True, 1, 2),
    Variant("decode", 192, 32, 4, 1, False, True, 3, 1),
    Variant("decode", 256, 32, 4, 1, False, True, 8, 1),
)
VARIANTS = (*FORWARD, *DECODE)


@dataclass(frozen=True)
class Plan:
    """A variant and its launch. grid: (row tiles * splits, heads, sequences); splits > 1: partial results, then the combining kernel."""

    variant: Variant
    grid: tuple[int, int, int]
    splits: int

    def __str__(self) -> str:
        splits = f", keys in {self.splits} splits" if self.splits > 1 else ""
        variant = self.variant
        return f"{variant.name}: grid {list(self.grid)} of {variant.threads} threads, {variant.shared_bytes} B shared{splits}"


def padded(head_dim: int) -> int:
    """The head dimension of the variants that serve one of `head_dim`. Raises ValueError beyond MAX_HEAD_DIM."""
    for variant in DECODE:
        if head_dim <= variant.head_dim:
            return variant.head_dim
    raise ValueError(f"head_dim is {head_dim}, kernels have up to {MAX_HEAD_DIM}")


def plan(spec: AttentionSpec, hardware: Hardware) -> Plan:
    """The quickest variant by `cost`. For a varlen call every sequence is taken to be as long as the longest."""
    dim = padded(max(spec.head_dim, spec.v_head_dim))
    units, shared_memory_bytes = hardware.units or 1, hardware.shared_memory_bytes or 0
    return _plan(dim, spec.batch, spec.q_heads, spec.kv_heads, spec.q_len, spec.kv_len, units, shared_memory_bytes)


@lru_cache(maxsize=4096)
def _plan(dim: int, batch: int, q_heads: int, kv_heads: int, q_len: int, kv_len: int, units: int, shared_memory_bytes: int) -> Plan:
    """plan() by its numbers: all layers of a decode step ask for the same one."""
    if q_len <= DECODE_MAX_QUERIES:
        variant = next(v for v in DECODE if v.head_dim == dim)
        tiles, heads = ceil(q_len * (q_heads // kv_heads) / DECODE_ROWS), kv_heads
        least = 2 * variant.warps * variant.keys             # two rounds of every warp pay for a further part
    else:
        fitting = [v for v in FORWARD if v.head_dim == dim and _occupancy(v, shared_memory_bytes, v.register_bound) >= v.blocks]
        variant = min(fitting, key=lambda v: cost(v, batch * q_heads, q_len, kv_len, units))
        tiles, heads, least = ceil(q_len / variant.queries), q_heads, 16 * variant.keys
    blocks = max(1, tiles * heads * batch)
    splits = max(1, min(units * variant.blocks // blocks, kv_len // least, MAX_SPLITS))
    return Plan(variant, (max(1, tiles) * splits, heads, batch), splits)


def cost(variant: Variant, heads: int, q_len: int, kv_len: int, units: int) -> float:
    """Clocks of a multiprocessor for a prefill of `heads` heads in all: waves of blocks times a block's work, without latencies."""
    blocks = ceil(q_len / variant.queries) * max(1, heads)
    return ceil(blocks / (units * variant.blocks)) * variant.blocks * ceil(kv_len / variant.keys) * tile_clocks(variant)["bound"]


def tile_clocks(variant: Variant) -> dict[str, float]:
    """Clocks of a multiprocessor for one tile of keys of a forward block: on the tensor cores, and on shared memory; bound: the larger.

    Every 8-byte access of a warp is two passes of 128 bytes, a clock each: per 16 x 16 x 4 step one operand, shared by the row tiles.
    """
    warps, D, K, R = variant.warps, variant.head_dim, variant.keys, variant.row_tiles
    steps = warps * R * 2 * (K // 16) * (D // 4)                                           # m8n8k4 steps of a warp, both products
    operand_loads = warps * ((D // 4) * (K // 16) + (K // 4) * (D // 16))                  # K and V
    operand_loads += warps * R * (K // 4 + (0 if variant.q_in_registers else D // 4))      # P and Q
    stores = warps * R * 2 * (K // 16) + 2 * 2 * K * D // 8 // 32                          # P; K and V
    clocks = {"tensor": steps * 1024 / TENSOR_FMA_PER_CLOCK, "shared": 32 * 8 / SHARED_BYTES_PER_CLOCK * (operand_loads + stores)}
    return {**clocks, "bound": max(clocks.values())}
