"""Two-level tiling (FastAttention, arXiv 2410.16663): one attention call as it is cut for the cores and buffers of an Ascend chip.

Level 1 is a block of block_m query rows x block_n keys: its scores go from the matrix unit (Cube) to the vector units, the weights back,
the partial output over again: three hand-overs a block, each a wait between units. So level-1 blocks are as large as L1 and UB allow.
Level 2 is a tile inside, cut for L0A, L0B and L0C so that copies and products overlap. Both levels are double-buffered, within capacity:

    L1   2 x Q block_m x D,  2 x (K or V) block_n x max(D, Dv),  2 x P tile_m x tile_n
    L0A  2 x tile_m x tile_k     L0B  2 x tile_k x tile_n     L0C  2 x tile_m x tile_n fp32
    UB   2 x vector_rows x block_n (score fp32, weight, mask byte), rows' output sums Dv fp32, maximum, sum and factor

A Tiling says what a plan takes and what work it makes, without running it; a test holds the numbers equal to what the executable model
(schedule_model.py) counts. Which plan to take is planner.py's.
"""

from __future__ import annotations

import heapq
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

from hetero_attn.spec import AttentionSpec, dtype_name
from hetero_attn_ascend import tiling_mask
from hetero_attn_ascend.chip import Buffers, Chip

HAND_OVERS = 3                          # of a level-1 block: scores, weights, partial output
MIN_VECTOR_ROWS = 8                     # rows that a vector sub-tile has at least: a reduction writes one 32-byte block of fp32 for them
FP32 = 4
SOFTMAX_PASSES = 6                      # scale, row maximum, subtract, exp, row sum, round: vector operations a score
MASK_PASSES = 1                         # select, for a score of a tile that an edge crosses
UPDATE_PASSES = 2                       # rescale and add, for a number of the output


@dataclass(frozen=True)
class Problem:
    """What of a call the planner looks at. rows: query rows of one task's head; at decode a group's query heads become rows."""

    batch: int
    kv_heads: int
    heads: int                          # task heads: query heads, or key/value heads where the group is folded
    rows: int                           # Sq, or group_size where it is folded
    kv_len: int
    head_dim: int
    v_head_dim: int
    element: int                        # bytes
    left: int                           # window, -1 = unlimited
    right: int                          # 0 = causal
    folded: bool

    @classmethod
    def of(cls, spec: AttentionSpec) -> Problem:
        """Raises ValueError for a dtype that the chips have not."""
        if spec.dtype.itemsize > FP32:
            raise ValueError(f"dtype is {dtype_name(spec.dtype)}, Ascend's units have float32, float16 and bfloat16; cast to float32")
        left, right = spec.window_size
        right = 0 if spec.is_causal else right
        folded = spec.q_len == 1 and spec.group_size > 1
        return cls(
            batch=spec.batch, kv_heads=spec.kv_heads, heads=spec.kv_heads if folded else spec.q_heads,
            rows=spec.group_size if folded else spec.q_len,
            kv_len=spec.kv_len, head_dim=spec.head_dim, v_head_dim=spec.v_head_dim, element=spec.dtype.itemsize,
            left=left, right=right, folded=folded,
        )

    def position(self, row: int) -> int:
        """The key at which a query row stands (bottom-right)."""
        return self.kv_len - 1 if self.folded else row + self.kv_len - self.rows

    def keys_of(self, first: int, rows: int) -> tuple[int, int]:
        """[start, end) of the keys that at least one of `rows` rows from `first` on sees."""
        start = 0 if self.left < 0 else max(0, self.position(first) - self.left)
        end = self.kv_len if self.right < 0 else min(self.kv_len, self.position(first + rows - 1) + self.right + 1)
        return (start, end) if end > start else (0, 0)


class Work(NamedTuple):
    """What a plan does in all, in the words of core_model.Counts."""

    hand_overs: int
    cube_flops: int                     # of whole matrix steps
    vector_ops: int
    global_bytes: int                   # between device memory (or L2) and the cores: q, k, v, out, and all that is handed over


@dataclass(frozen=True)
class Tiling:
    """A plan. Sizes are rows, keys and features; `buffers` is what it takes of each buffer, in bytes."""

    chip: Chip
    problem: Problem
    block_m: int
    block_n: int
    tile_m: int
    tile_n: int
    tile_k: int
    vector_rows: int

    @property
    def buffers(self) -> dict[str, int]:
        problem, chip = self.problem, self.chip
        K, V = self.padded_k, self.padded_v
        rows_of_unit = -(-self.block_m // chip.vector_units)
        pieces = {
            "L1": [2 * [self.block_m * K * problem.element], 2 * [self.block_n * max(K, V) * problem.element],
                   2 * [self.tile_m * self.tile_n * problem.element]],
            "L0A": [2 * [self.tile_m * self.tile_k * problem.element]],
            "L0B": [2 * [self.tile_k * self.tile_n * problem.element]],
            "L0C": [2 * [self.tile_m * self.tile_n * FP32]],
            "UB": [[rows_of_unit * V * FP32], 3 * [rows_of_unit * FP32], 2 * self._vector_pieces()],
        }
        return {name: sum(chip.aligned(name, size) for group in pieces[name] for size in group) for name in Buffers._fields}

    def _vector_pieces(self) -> list[int]:
        """One stage of the softmax (score, weight, mask), or of the output's update where that is larger."""
        softmax = [self.vector_rows * self.block_n * FP32, self.vector_rows * self.block_n * self.problem.element,
                   self.vector_rows * self.block_n]
        update = [self.vector_rows * self.padded_v * FP32]
        return max(softmax, update, key=sum)

    @property
    def padded_k(self) -> int:
        return _padded(self.problem.head_dim, self.chip.matrix_shape[2])

    @property
    def padded_v(self) -> int:
        return _padded(self.problem.v_head_dim, self.chip.matrix_shape[1])

    @property
    def fits(self) -> bool:
        return all(used <= getattr(self.chip.capacity, name) for name, used in self.buffers.items())

    @property
    def row_blocks(self) -> int:
        return max(1, -(-self.problem.rows // self.block_m))

    @property
    def first_keys(self) -> int:
        """The first keys of level-1 blocks are multiples of this, so that level-2 tiles are the same whatever the window."""
        return self.tile_n

    def blocks_of(self, row_block: int) -> list[tuple[int, int]]:
        """(first key, keys) of the level-1 blocks that a row block visits."""
        _, start, end = self._span(row_block)
        return [(key, min(self.block_n, end - key)) for key in range(start, end, self.block_n)]

    def _span(self, row_block: int) -> tuple[int, int, int]:
        """First row, and [start, end) of the keys of a row block's level-1 blocks."""
        first = row_block * self.block_m
        if not self.problem.rows:
            return first, 0, 0
        start, end = self.problem.keys_of(first, min(self.block_m, self.problem.rows - first))
        return first, start - start % self.first_keys, end

    def steps(self) -> list[int]:
        """Level-1 blocks of each row block of one head."""
        return list(self._steps)

    @cached_property
    def _steps(self) -> tuple[int, ...]:
        spans = (self._span(row_block) for row_block in range(self.row_blocks))
        return tuple(-(-(end - start) // self.block_n) for _, start, end in spans)

    def hand_overs(self) -> int:
        """Of the whole call, on all cores together."""
        return HAND_OVERS * self.problem.batch * self.problem.heads * sum(self._steps)

    def busiest_core(self) -> int:
        """Hand-overs that the busiest core waits for, one after another, where tasks are split as evenly as they can be."""
        heads = self.problem.batch * self.problem.heads
        return HAND_OVERS * max(max(self._steps, default=0), -(-heads * sum(self._steps) // self.chip.cores)) if heads else 0

    def assignment(self) -> list[list[tuple[int, int]]]:
        """For each core its tasks (batch * heads + head, row block): the longest tasks first, each to the core with the least so far."""
        steps = self.steps()
        every = [(head, block) for head in range(self.problem.batch * self.problem.heads) for block in range(self.row_blocks)]
        return [[every[index] for index in core] for core in even_split([steps[block] for _, block in every], self.chip.cores)]

    def traffic(self) -> int:
        """Bytes between device memory (or L2) and the cores."""
        return self.work.global_bytes

    @cached_property
    def work(self) -> Work:
        """Of the whole call."""
        problem, (m_step, n_step, k_step) = self.problem, self.chip.matrix_shape
        element, Dv = problem.element, problem.v_head_dim
        features = -(-Dv // self.tile_n)                            # tiles of features: each reads the block's weights anew
        flops = operations = moved = 0
        for row_block, steps in enumerate(self._steps):
            first, start, end = self._span(row_block)
            rows, keys = max(0, min(self.block_m, problem.rows - first)), end - start
            moved += rows * (problem.head_dim + Dv) * element                                       # q, out
            if not steps:
                continue
            moved += keys * (problem.head_dim + Dv) * element                                       # k, v
            moved += rows * keys * (FP32 + element) + steps * rows * Dv * FP32                      # read by Vector; weights written
            operations += rows * keys * SOFTMAX_PASSES + steps * rows * Dv * UPDATE_PASSES
            for row in range(first, first + rows, self.tile_m):
                m = min(self.tile_m, first + rows - row)
                low, high = problem.keys_of(row, m)
                pieces = ((r, min(self.vector_rows, row + m - r)) for r in range(row, row + m, self.vector_rows))
                masked = sum(n * (keys - self._whole_keys(r, n, start, end)) for r, n in pieces)
                moved, operations = moved + masked, operations + masked * MASK_PASSES
                if low >= high:
                    continue
                low, high = low - low % self.tile_n, min(end, _padded(high, self.tile_n))           # as whole tiles
                blocks = -(-(high - start) // self.block_n) - (low - start) // self.block_n
                seen = high - low
                moved += m * seen * (FP32 + element * features) + blocks * m * Dv * FP32            # written by Cube; weights read
                flops += 2 * _padded(m, m_step) * (_padded(seen, n_step) * self.padded_k + _padded(seen, k_step) * _padded(Dv, n_step))
        heads = problem.batch * problem.heads
        return Work(self.hand_overs(), flops * heads, operations * heads, moved * heads)

    def _whole_keys(self, row: int, rows: int, start: int, end: int) -> int:
        """How many keys of [start, end) lie in tiles that all of these rows see whole."""
        problem = self.problem
        position = problem.position(row)
        last = position if problem.folded else position + rows - 1
        low = start if problem.left < 0 else max(start, _padded(max(last - problem.left, 0), self.tile_n, least=0))
        high = end if problem.right < 0 or problem.folded else max(position + problem.right + 1, 0)
        return max(0, (end if high >= end else high - high % self.tile_n) - low)

    @property
    def mask_side(self) -> int:
        """2M of the tiling-mask, which is cut for level-2 tiles."""
        return tiling_mask.side(self.tile_m, self.tile_n)

    @property
    def mask_bytes(self) -> int:
        """The tiling-mask, one byte an entry; 0 where the call needs none."""
        needs = not self.problem.folded and (self.problem.left >= 0 or self.problem.right >= 0)
        return self.mask_side**2 if needs else 0

    @property
    def full_mask_bytes(self) -> int:
        """The S x S mask that it stands for."""
        return self.problem.rows * self.problem.kv_len if self.mask_bytes else 0

    def to_dict(self) -> dict:
        return {
            "chip": self.chip.name, "problem": asdict(self.problem), "level_1": [self.block_m, self.block_n],
            "level_2": [self.tile_m, self.tile_n, self.tile_k], "vector_rows": self.vector_rows, "buffers": self.buffers,
            "capacity": self.chip.capacity._asdict(), "hand_overs": self.hand_overs(), "hand_overs_busiest_core": self.busiest_core(),
            "tasks": self.problem.batch * self.problem.heads * self.row_blocks, "cores": self.chip.cores,
            "mask_bytes": self.mask_bytes, "full_mask_bytes": self.full_mask_bytes,
        }


def _padded(size: int, step: int, least: int = 1) -> int:
    return max(least, -(-size // step)) * step


def even_split(weights: list[int], cores: int) -> list[list[int]]:
    """For each core the indices of its tasks: the heaviest first, each to the core with the least so far; every task on one core."""
    load = [(0, core) for core in range(cores)]
    tasks: list[list[int]] = [[] for _ in range(cores)]
    for index in sorted(range(len(weights)), key=lambda index: -weights[index]):
        weight, core = heapq.heappop(load)
        tasks[core].append(index)
        heapq.heappush(load, (weight + max(weights[index], 1), core))
    return tasks
