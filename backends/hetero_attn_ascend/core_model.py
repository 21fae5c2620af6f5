"""One Ascend core as a model that can be executed: buffers with a capacity, copies that are counted, products that are tiled through L0.

With `execute` the tensors are real: an allocation begins as NaN, becomes NaN again when it is freed, and an allocation beyond the capacity
is an error; so a schedule that overflows a buffer, reads what it has freed or forgets a copy cannot pass for a right one. Without it only
sizes are kept, and the same schedule counts what it would move for lengths that no CPU could compute.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch

from hetero_attn_ascend.chip import Buffers, Chip


class BufferOverflow(MemoryError):
    """An allocation does not fit. The text names buffer, bytes asked for, bytes in use and capacity."""


@dataclass
class Piece:
    """Part of a buffer. data: the numbers, None where the model only counts."""

    buffer: str
    shape: tuple[int, ...]
    size: int                                   # bytes, alignment included
    data: torch.Tensor | None
    live: bool = True


@dataclass
class Counts:
    """What a schedule did. bytes_moved: path ("GM>L1") -> bytes; peak: buffer -> most bytes in use at once."""

    bytes_moved: Counter = field(default_factory=Counter)
    copies: Counter = field(default_factory=Counter)
    hand_overs: int = 0
    cube_flops: int = 0                         # of whole matrix steps: padding counts, because the unit spends the time
    vector_ops: int = 0
    level_1_blocks: int = 0
    tiles_masked: int = 0
    tiles_skipped: int = 0
    peak: Counter = field(default_factory=Counter)

    def add(self, other: Counts, times: int = 1) -> None:
        """Add `times` repetitions of other; peaks are the larger of the two."""
        for name in ("bytes_moved", "copies"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += value * times
        for name in ("hand_overs", "cube_flops", "vector_ops", "level_1_blocks", "tiles_masked", "tiles_skipped"):
            setattr(self, name, getattr(self, name) + getattr(other, name) * times)
        self.peak |= other.peak

    @property
    def global_bytes(self) -> int:
        """Bytes that cross between the core and device memory or L2."""
        return sum(size for path, size in self.bytes_moved.items() if "GM" in path)


class Core:
    """Buffers and counters of one core (UB: of one of its vector units)."""

    def __init__(self, chip: Chip, *, execute: bool = True) -> None:
        self.chip, self.execute = chip, execute
        self.counts = Counts()
        self.in_use: Counter = Counter({name: 0 for name in Buffers._fields})

    def alloc(self, buffer: str, shape: tuple[int, ...], dtype: torch.dtype) -> Piece:
        """Raises BufferOverflow."""
        size = self.chip.aligned(buffer, math.prod(shape) * dtype.itemsize)
        capacity = getattr(self.chip.capacity, buffer)
        if self.in_use[buffer] + size > capacity:
            raise BufferOverflow(f"{buffer}: {size} bytes asked for, {self.in_use[buffer]} of {capacity} in use")
        self.in_use[buffer] += size
        self.counts.peak[buffer] = max(self.counts.peak[buffer], self.in_use[buffer])
        data = torch.full(shape, float("nan"), dtype=dtype) if self.execute and dtype.is_floating_point else None
        if self.execute and data is None:
            data = torch.full(shape, 0xA5, dtype=dtype)
        return Piece(buffer, shape, size, data)

    def free(self, *pieces: Piece | None) -> None:
        """Give space back; the numbers turn into NaN, so that a later read of them shows. Raises ValueError for a second free."""
        for piece in pieces:
            if piece is None:
                continue
            if not piece.live:
                raise ValueError(f"a piece of {piece.buffer} {piece.shape} is freed twice")
            piece.live = False
            self.in_use[piece.buffer] -= piece.size
            if piece.data is not None:
                piece.data.fill_(float("nan") if piece.data.is_floating_point() else 0xA5)

    def copy(self, path: str, into: Piece | None, source: torch.Tensor | None, shape: tuple[int, int], itemsize: int) -> None:
        """One copy of a [rows, columns] block to the upper left of a piece; the rest of the piece becomes 0, as a padded copy leaves it."""
        self.counts.bytes_moved[path] += shape[0] * shape[1] * itemsize
        self.counts.copies[path] += 1
        if self.execute and into is not None:
            into.data.zero_()
            into.data[: shape[0], : shape[1]] = source

    def hand_over(self) -> None:
        """One unit waits for the other."""
        self.counts.hand_overs += 1

    def vector(self, operations: int) -> None:
        self.counts.vector_ops += operations


class Ring:
    """Two slots used in turn: the next piece is filled while the last one is still read. What double buffering takes of a buffer."""

    def __init__(self, core: Core) -> None:
        self._core, self._held = core, []

    def next(self, buffer: str, shape: tuple[int, ...], dtype: torch.dtype) -> Piece:
        if len(self._held) == 2:
            self._core.free(self._held.pop(0))
        self._held.append(self._core.alloc(buffer, shape, dtype))
        return self._held[-1]

    def close(self) -> None:
        self._core.free(*self._held)
        self._held = []
