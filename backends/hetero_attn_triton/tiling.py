"""How a call is cut: rows and keys of a tile, warps, pipeline stages, splits of the keys. Pure arithmetic on the spec and device numbers.

A tile must fit shared memory (Q, and K and V once a stage) and the registers of its warps (sums, scores, weights); of those that fit the
first of CANDIDATES is taken, or the one that `tuning.py` measured to be quickest on this device. Nothing here needs triton, so
`explain --tiling` and the tests work anywhere; tests compile the kernels and hold their shared memory to `shared_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import torch

from hetero_attn.spec import AttentionSpec

MAX_HEAD_DIM = 256
LEAST = 16                             # of every side of tl.dot
DECODE_ROWS = {2: 64, 4: 16}           # bytes of the dtype -> up to so many rows (queries x heads of a group) are folded into one tile
FOLDED_ROWS, FOLDED_QUERIES = 256, 16  # so many rows of so few queries are folded into several tiles: a head alone would leave them empty
ENOUGH = 0.9                           # share of the best use of a device at which fewer splits are taken
MAX_SPLITS = 128
SPLIT_BLOCKS = 4                       # blocks of keys that pay for a further program, its partial result and the combining kernel
REGISTERS = 176 * 32                   # fp32 values of a tile in a warp's lanes, of 255 each; the rest are addresses and rows
SCRATCH = 2048                         # bytes that reductions across warps take
ASSUMED_UNITS, ASSUMED_SHARED = 108, 101376     # where a profile says nothing: 99 K, the least among compute capabilities 8.x (8.6, 8.9)


@dataclass(frozen=True)
class Tile:
    """rows: of Q; keys: of a block; warps that share it; stages: blocks of K and V in flight."""

    rows: int
    keys: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows} rows x {self.keys} keys, {self.warps} warps, {self.stages} stages"

    def shared_bytes(self, dim: int, v_dim: int, element: int, mask: int = 0) -> int:
        """The most that the compiler asks for: Q; K, V and mask in every stage. dim, v_dim: padded; element, mask: bytes of a number."""
        stage = self.keys * (element * (dim + v_dim) + self.rows * mask)
        return element * self.rows * dim + self.stages * stage + SCRATCH

    def registers(self, dim: int, v_dim: int, element: int, wide_products: bool, beside: int = 0) -> int:
        """fp32 values a warp keeps alive through the loop: sums, scores, the weights in the dtype, and Q unless products read it from
        shared memory. beside: halves of the scores' size that work on them takes, see `beside_products`."""
        halves = (self.keys + (0 if wide_products else dim)) * element / 4 + self.keys * beside / 2
        return ceil(self.rows * (v_dim + self.keys + halves) / self.warps)


# (rows, keys, warps, stages) in order of preference: more rows read K and V less often, more keys mean fewer rescalings. What is listed
# compiles for sm_80 and sm_90 without a spill where `fits` lets it through; which is quickest `tuning.py` measures on the device.
PREFILL_HALF = (
    Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 1),
    Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 1),
    Tile(16, 16, 4, 1),
)
DECODE_HALF = (
    Tile(0, 64, 4, 3), Tile(0, 64, 4, 2), Tile(0, 128, 4, 3), Tile(0, 64, 4, 4), Tile(0, 32, 4, 3), Tile(0, 32, 4, 2), Tile(0, 16, 4, 2),
    Tile(0, 16, 4, 1), Tile(0, 32, 8, 1), Tile(0, 16, 8, 1),
)                                      # rows: as many as there are
SINGLE = (Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1))

SINGLE_WIDE = (Tile(16, 32, 8, 1), Tile(16, 16, 8, 1))                # beyond 64 features: IEEE products keep whole operands in registers


@dataclass(frozen=True)
class Device:
    """What planning uses of a device: streaming multiprocessors (compute units), and shared memory that one block may use, bytes."""

    units: int
    shared_memory_bytes: int
    wide_products: bool = False        # Hopper's: operands come from shared memory, 64 rows at a time
    most_rows: int = 128               # of a tile; 32 on compute capability 10.x: Triton 3.6 fails to compile its taller products here

    @classmethod
    def of(cls, hardware: Any) -> Device:
        """A profile's numbers; where it has none, those of a small GPU that the kernels are meant for."""
        wide = (hardware.matrix_shape or (0,))[0] >= 64
        return cls(hardware.units or ASSUMED_UNITS, hardware.shared_memory_bytes or ASSUMED_SHARED, wide)


@dataclass(frozen=True)
class Plan:
    """A tile and its launch: heads are folded into rows (`heads` of them a row group), keys dealt out to `splits` programs."""

    tile: Tile
    heads: int
    tiles: int
    splits: int
    dim: int                           # padded
    v_dim: int
    programs: int
    shared_bytes: int

    @property
    def kind(self) -> str:
        return "decode" if self.heads > 1 or self.tile.rows < 32 else "prefill"

    def __str__(self) -> str:
        splits = f", keys in {self.splits} splits" if self.splits > 1 else ""
        folded = f", {self.heads} query heads folded into rows" if self.heads > 1 else ""
        return f"triton {self.tile}{folded}: {self.programs} programs, {self.shared_bytes} B shared{splits}"

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        tile = self.tile
        return {"rows": tile.rows, "keys": tile.keys, "warps": tile.warps, "stages": tile.stages, "heads": self.heads, "tiles": self.tiles,
                "splits": self.splits, "programs": self.programs, "shared_bytes": self.shared_bytes}


def padded(head_dim: int) -> int:
    """The next power of two, which tl.dot and tl.arange want. Raises ValueError beyond MAX_HEAD_DIM."""
    if not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}, the kernel has 1 to {MAX_HEAD_DIM}")
    return max(LEAST, 1 << (head_dim - 1).bit_length())


def folded(spec: AttentionSpec) -> bool:
    """Whether a group's query heads are folded into rows: where a head alone would leave most of a tile empty."""
    rows = spec.q_len * spec.group_size
    several = spec.q_len <= FOLDED_QUERIES and spec.group_size > 1 and rows <= FOLDED_ROWS
    return spec.dtype.itemsize in DECODE_ROWS and (rows <= DECODE_ROWS[spec.dtype.itemsize] or several)


@lru_cache(maxsize=4096)
def shape_class(spec: AttentionSpec) -> str:
    """The class of calls that share a tuned tile, such as 'prefill-d128-v128-half': dimensions and dtype, not lengths."""
    kind = "decode" if folded(spec) else "prefill"
    element = "single" if spec.dtype == torch.float32 else "half"
    return f"{kind}-d{padded(spec.head_dim)}-v{padded(spec.v_head_dim)}-{element}"


def beside_products(spec: AttentionSpec) -> int:
    """What scores take beside products, in halves of their own size: softcap and ALiBi one, a mask (an address for each) four more."""
    return (4 if spec.mask else 0) + int(bool(spec.softcap or spec.alibi or spec.mask))


@dataclass(frozen=True)
class Demand:
    """What a call asks of a tile: padded head dimensions, bytes of a number of Q, K, V and of the mask (0 = none), `beside_products`."""

    dim: int
    v_dim: int
    element: int
    mask: int
    beside: int

    @classmethod
    def of(cls, spec: AttentionSpec) -> Demand:
        mask = min(spec.mask.itemsize, 4) if spec.mask else 0                 # a mask in fp64 is read as fp32
        return cls(padded(spec.head_dim), padded(spec.v_head_dim), spec.dtype.itemsize, mask, beside_products(spec))

    def shared_bytes(self, tile: Tile) -> int:
        return tile.shared_bytes(self.dim, self.v_dim, self.element, self.mask)


def fits(tile: Tile, demand: Demand, device: Device) -> bool:
    """Whether a tile's shared memory and registers are there."""
    registers = tile.registers(demand.dim, demand.v_dim, demand.element, device.wide_products, demand.beside)
    return demand.shared_bytes(tile) <= device.shared_memory_bytes and registers <= REGISTERS


def candidates(spec: AttentionSpec, device: Device) -> list[Tile]:
    """Every tile that fits, in order of preference; never empty. Raises ValueError where not even the smallest fits."""
    return list(_candidates(Demand.of(spec), spec.q_len * spec.group_size if folded(spec) else 0, device))


@lru_cache(maxsize=1024)
def _candidates(demand: Demand, rows: int, device: Device) -> tuple[Tile, ...]:
    """rows: of a folded call, 0 for others."""
    if rows:
        tall = min(max(LEAST, 1 << (rows - 1).bit_length()), DECODE_ROWS[demand.element], device.most_rows)
        tiles = [Tile(tall, tile.keys, tile.warps, tile.stages) for tile in DECODE_HALF if demand.element == 2 or tile.keys <= 64]
    else:
        single = SINGLE if max(demand.dim, demand.v_dim) <= 64 else SINGLE_WIDE
        tiles = [tile for tile in (PREFILL_HALF if demand.element == 2 else single) if tile.rows <= device.most_rows]
    found = tuple(tile for tile in tiles if fits(tile, demand, device))
    if not found:
        need = min(demand.shared_bytes(tile) for tile in tiles)
        raise ValueError(f"head_dim {demand.dim} needs {need} B of shared memory (and registers), the device has "
                         f"{device.shared_memory_bytes} B")
    return found


def plan(spec: AttentionSpec, device: Device, tuned: Mapping[str, Tile] | None = None, without: frozenset[Tile] = frozenset()) -> Plan:
    """The call's tile and launch. tuned: shape_class -> the tile that was measured to be quickest; one that does not fit is passed over.
    without: tiles that were tried and did not run. Raises ValueError where no other is left.

    For a varlen call every sequence is taken to be as long as the longest."""
    return _plan(spec, device, None if tuned is None else tuned.get(shape_class(spec)), without)


@lru_cache(maxsize=4096)
def _plan(spec: AttentionSpec, device: Device, chosen: Tile | None, without: frozenset[Tile] = frozenset()) -> Plan:
    """plan() with what was measured: all layers of a decode step ask for the same one."""
    fold = folded(spec)
    rows = spec.q_len * spec.group_size if fold else spec.q_len
    possible = [tile for tile in candidates(spec, device) if tile not in without]
    if not possible:
        raise ValueError(f"the device refused every tile that was planned for {shape_class(spec)}")
    tile = possible[0]
    if chosen is not None:
        chosen = Tile(tile.rows if fold else chosen.rows, chosen.keys, chosen.warps, chosen.stages)
        usable = chosen not in without and chosen.rows <= device.most_rows and fits(chosen, Demand.of(spec), device)
        tile = chosen if usable else tile
    if not fold and spec.q_len < tile.rows:                         # a short prompt fills no tall tile, measured or not
        most = max(LEAST, 2 * spec.q_len)
        tile = tile if tile.rows <= most else next((each for each in possible if each.rows <= most), possible[-1])
    return planned(spec, device, tile, fold, rows)


def planned(spec: AttentionSpec, device: Device, tile: Tile, fold: bool, rows: int) -> Plan:
    """The launch of a call by a given tile."""
    demand = Demand.of(spec)
    tiles, heads = max(1, ceil(rows / tile.rows)), spec.kv_heads if fold else spec.q_heads
    programs = tiles * heads * spec.batch
    resident = max(1, min(device.shared_memory_bytes // demand.shared_bytes(tile), 4))
    blocks = ceil(visible_keys(spec, tile) / tile.keys)
    splits = splits_of(programs, blocks, device.units * resident)
    return Plan(tile, spec.group_size if fold else 1, tiles, splits, demand.dim, demand.v_dim, programs * splits, demand.shared_bytes(tile))


def splits_of(programs: int, blocks: int, slots: int) -> int:
    """The fewest splits of `blocks` blocks that keep ENOUGH of `slots` programs at once busy, as the best number of splits would.

    With s splits of ceil(blocks / s) blocks the device works ceil(programs * s / slots) waves of such a share."""
    most = min(blocks // SPLIT_BLOCKS, MAX_SPLITS)
    if most < 2 or not 0 < programs < slots:         # a full wave without splits: partial sums would cost more than its rest saves
        return 1

    def busy(splits: int) -> float:
        share = ceil(blocks / splits)
        return programs * blocks / (ceil(programs * ceil(blocks / share) / slots) * slots * share)

    shares = {splits: busy(splits) for splits in range(1, most + 1)}
    return next(splits for splits, share in shares.items() if share >= ENOUGH * max(shares.values()))


def visible_keys(spec: AttentionSpec, tile: Tile) -> int:
    """The most keys that a tile's rows see together."""
    left, right = spec.window_size
    right = 0 if spec.is_causal else right
    rows = min(spec.q_len, tile.rows)
    return min(spec.kv_len, left + right + rows) if left >= 0 and right >= 0 else spec.kv_len
