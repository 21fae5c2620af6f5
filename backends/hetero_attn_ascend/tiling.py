"""Two-level tiling (FastAttention, arXiv 2410.16663): how one attention call is cut for the cores and buffers of an Ascend chip.

Level 1 is a block of block_m query rows x block_n keys: its scores go from the matrix unit (Cube) to the vector units, the weights back,
the partial output over again: three hand-overs a block, each a wait between units. So level-1 blocks are as large as L1 and UB allow.
Level 2 is a tile inside, cut for L0A, L0B and L0C so that copies and products overlap. Both levels are double-buffered, within capacity:

    L1   2 x Q block_m x D,  2 x (K or V) block_n x max(D, Dv),  2 x P tile_m x tile_n
    L0A  2 x tile_m x tile_k     L0B  2 x tile_k x tile_n     L0C  2 x tile_m x tile_n fp32
    UB   2 x vector_rows x block_n (score fp32, weight, mask byte), rows' output sums Dv fp32, maximum, sum and factor
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache

from hetero_attn.spec import AttentionSpec
from hetero_attn_ascend import tiling_mask
from hetero_attn_ascend.chip import Buffers, Chip

HAND_OVERS = 3                          # of a level-1 block: scores, weights, partial output
MIN_VECTOR_ROWS = 8                     # rows that a vector sub-tile has at least: a reduction writes one 32-byte block of fp32 for them
MAX_BLOCK_M = 1024
FP32 = 4


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

    def blocks_of(self, row_block: int) -> list[tuple[int, int]]:
        """(first key, keys) of the level-1 blocks that a row block visits; first keys are multiples of tile_n, so that level-2 tiles are
        the same whatever the window."""
        first = row_block * self.block_m
        start, end = self.problem.keys_of(first, min(self.block_m, self.problem.rows - first)) if self.problem.rows else (0, 0)
        start -= start % self.tile_n
        return [(key, min(self.block_n, end - key)) for key in range(start, end, self.block_n)]

    def steps(self) -> list[int]:
        """Level-1 blocks of each row block of one head."""
        counts = []
        for row_block in range(self.row_blocks):
            first = row_block * self.block_m
            start, end = self.problem.keys_of(first, min(self.block_m, self.problem.rows - first)) if self.problem.rows else (0, 0)
            counts.append(-(-(end - (start - start % self.tile_n)) // self.block_n) if end > start else 0)
        return counts

    def hand_overs(self) -> int:
        """Of the whole call, on all cores together."""
        return HAND_OVERS * self.problem.batch * self.problem.heads * sum(self.steps())

    def busiest_core(self) -> int:
        """Hand-overs that the busiest core waits for, one after another, where tasks are split as evenly as they can be."""
        steps = self.steps()
        heads = self.problem.batch * self.problem.heads
        return HAND_OVERS * max(max(steps, default=0), -(-heads * sum(steps) // self.chip.cores))

    def assignment(self) -> list[list[tuple[int, int]]]:
        """For each core its tasks (batch * heads + head, row block): the longest tasks first, each to the core with the least so far."""
        steps = self.steps()
        every = [(head, block) for head in range(self.problem.batch * self.problem.heads) for block in range(self.row_blocks)]
        return [[every[index] for index in core] for core in even_split([steps[block] for _, block in every], self.chip.cores)]

    def traffic(self) -> int:
        """Bytes between device memory (or L2) and the cores: q, k, v and out, and the scores, weights and sums that are handed over."""
        problem = self.problem
        K, V, element = problem.head_dim, problem.v_head_dim, problem.element
        rows, total = problem.rows, 0
        for block, steps in enumerate(self.steps()):
            if not steps:
                continue
            m = min(self.block_m, rows - block * self.block_m)
            keys = sum(n for _, n in self.blocks_of(block))
            total += m * (K + V) * element + keys * (K + V) * element + m * keys * 2 * (FP32 + element) + 2 * steps * m * V * FP32
        return total * problem.batch * problem.heads

    @property
    def mask_bytes(self) -> int:
        """The tiling-mask, one byte an entry; 0 where the call needs none."""
        needs = not self.problem.folded and (self.problem.left >= 0 or self.problem.right >= 0)
        return tiling_mask.side(self.tile_m, self.tile_n) ** 2 if needs else 0

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


def _padded(size: int, step: int) -> int:
    return max(1, -(-size // step)) * step


def _sizes(limit: int, step: int) -> Iterator[int]:
    """step, 2 step, 4 step, ... up to the first that covers `limit`."""
    size = step
    while True:
        yield size
        if size >= limit:
            return
        size *= 2


def _level_2(chip: Chip, problem: Problem) -> Iterator[tuple[int, int, int]]:
    """(tile_m, tile_n, tile_k) that fit L0A, L0B and L0C twice, the cheapest to feed from L1 first.

    A tile reads tile_m + tile_n vectors of L1 for tile_m * tile_n sums, so its cost is 1/tile_m + 1/tile_n; and a longer tile_k is one
    copy instead of two. Tiles that cost more than twice the cheapest are left out: what level 1 gains by them the matrix unit waits for.
    """
    m_step, n_step, k_step = chip.matrix_shape
    longest_k = _padded(problem.head_dim, k_step)
    found = []
    for m in _sizes(min(problem.rows, 256), m_step):
        for n in _sizes(min(max(problem.kv_len, 1), 512), n_step):
            if 2 * chip.aligned("L0C", m * n * FP32) > chip.capacity.L0C:
                break
            ks = [k for k in _sizes(min(longest_k, 256), k_step)
                  if 2 * chip.aligned("L0A", m * k * problem.element) <= chip.capacity.L0A
                  and 2 * chip.aligned("L0B", k * n * problem.element) <= chip.capacity.L0B]
            if ks:
                found.append((1 / m + 1 / n, -ks[-1], (m, n, ks[-1])))
    yield from (tile for cost, _, tile in sorted(found) if cost <= 2 * min(found)[0])


@lru_cache(maxsize=256)
def two_level_tiles(chip: Chip, problem: Problem) -> Tiling:
    """The plan whose busiest core waits for the fewest hand-overs; of those the one with the least traffic, then the one that feeds the
    matrix unit cheapest. Raises ValueError if nothing fits the buffers."""
    best, best_score = None, None
    for tile_m, tile_n, tile_k in _level_2(chip, problem):
        rows = _padded(max(problem.rows, 1), tile_m)
        keys = _padded(max(problem.kv_len, 1), tile_n)
        for block_m in range(tile_m, min(rows, MAX_BLOCK_M) + 1, tile_m):
            plan = _widest(chip, problem, block_m, keys, tile_m, tile_n, tile_k)
            if plan is None:
                break
            score = (plan.busiest_core(), plan.traffic(), 1 / tile_m + 1 / tile_n, -plan.vector_rows)
            if best_score is None or score < best_score:
                best, best_score = plan, score
    if best is None:
        raise ValueError(f"no tiling of head_dim {problem.head_dim} (v {problem.v_head_dim}) in {problem.element}-byte numbers fits "
                         f"{chip.name}'s buffers {chip.capacity._asdict()}; use a smaller head_dim or a 16-bit dtype")
    return best


def one_level_tiles(chip: Chip, problem: Problem) -> Tiling:
    """What one level of blocks would do, for comparison: the block is the tile, so every tile is handed over by itself."""
    tile_m, tile_n, tile_k = next(tile for tile in _level_2(chip, problem))
    return _with_vector_rows(Tiling(chip, problem, tile_m, tile_n, tile_m, tile_n, tile_k, MIN_VECTOR_ROWS))


def _widest(chip: Chip, problem: Problem, block_m: int, keys: int, tile_m: int, tile_n: int, tile_k: int) -> Tiling | None:
    """The plan with the widest block_n that fits; of equally many blocks the narrowest, so that the last is not left half empty."""
    low, high = 0, keys // tile_n                               # in tiles: `low` fits, everything above `high` does not
    while low < high:
        middle = (low + high + 1) // 2
        fits = Tiling(chip, problem, block_m, middle * tile_n, tile_m, tile_n, tile_k, MIN_VECTOR_ROWS).fits
        low, high = (middle, high) if fits else (low, middle - 1)
    if not low:
        return None
    tiles = keys // tile_n
    width = -(-tiles // -(-tiles // low))
    widest = Tiling(chip, problem, block_m, width * tile_n, tile_m, tile_n, tile_k, MIN_VECTOR_ROWS)
    return _with_vector_rows(widest)


def _with_vector_rows(plan: Tiling) -> Tiling:
    """As many rows a vector sub-tile as UB has room for, up to a vector unit's share of the block and a tile's rows."""
    share = min(plan.tile_m, -(-plan.block_m // plan.chip.vector_units))          # the tiling-mask serves up to tile_m rows
    rows, chosen = MIN_VECTOR_ROWS, plan
    while rows <= max(share, MIN_VECTOR_ROWS):
        wider = Tiling(plan.chip, plan.problem, plan.block_m, plan.block_n, plan.tile_m, plan.tile_n, plan.tile_k, rows)
        if not wider.fits:
            break
        chosen, rows = wider, rows * 2
    return chosen


def kernel_blocks(chip: Chip, problem: Problem) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N) of the Triton kernel: its tile is a level-1 block that stays in UB whole (Triton hands over no part of one), in
    powers of two. The largest that fits, of equals the one with more rows, which reads keys less often. Raises ValueError."""
    step = chip.matrix_shape[0]
    K, V = (2 ** (_padded(size, step) - 1).bit_length() for size in (problem.head_dim, problem.v_head_dim))
    best = None
    for block_m in _sizes(min(max(problem.rows, 1), 128), step):
        for block_n in _sizes(min(max(problem.kv_len, 1), 512), step):
            rows = -(-block_m // chip.vector_units)
            # score, weight in fp32 and as it is handed over, mask; output so far and its partial product; four numbers a row
            vector = rows * (block_n * (2 * FP32 + problem.element + 1) + 2 * V * FP32 + 4 * FP32)
            matrix = (block_m * K + 2 * block_n * (K + V) + block_m * block_n) * problem.element
            if vector <= chip.capacity.UB and matrix <= chip.capacity.L1:
                best = max(best or (0, 0, 0), (block_m * block_n, block_m, block_n))
    if best is None:
        raise ValueError(f"no block of the kernel with head_dim {problem.head_dim} (v {problem.v_head_dim}) fits {chip.name}'s buffers")
    return best[1:]


def even_split(weights: list[int], cores: int) -> list[list[int]]:
    """For each core the indices of its tasks: the heaviest first, each to the core with the least so far; every task on one core."""
    load = [(0, core) for core in range(cores)]
    tasks: list[list[int]] = [[] for _ in range(cores)]
    for index in sorted(range(len(weights)), key=lambda index: -weights[index]):
        weight, core = heapq.heappop(load)
        tasks[core].append(index)
        heapq.heappush(load, (weight + max(weights[index], 1), core))
    return tasks
