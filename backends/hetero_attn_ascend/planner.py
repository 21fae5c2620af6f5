"""Which tiling a call gets: level-1 blocks as large as the buffers allow, level-2 tiles inside them, chosen by the model's own time.

Three searches over the same rule: free of any compiler (`two_level_tiles`, what a hand-written kernel could do), with tiles for blocks
(`one_level_tiles`, for comparison), and with the sizes that Triton can launch (`kernel_tiles`, what ours does launch). The rule: among the
plans whose busiest core waits for at most a tenth more Cube-Vector hand-overs than need be, the one that the model calls quickest; so that
a wait nobody has measured decides between plans that differ much in waits, and traffic and work between those that do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product

from hetero_attn_ascend.chip import Chip
from hetero_attn_ascend.kernel_tiling import LOOPS, KernelTiling, power_of_two
from hetero_attn_ascend.schedule_model import HAND_OVER_US, estimate
from hetero_attn_ascend.tiling import FP32, MIN_VECTOR_ROWS, Problem, Tiling, _padded

MAX_BLOCK_M = 1024
MAX_KERNEL_BLOCK = (512, 1024)
NEAR = 1.1                              # hand-overs against the fewest that are as good as the fewest


@lru_cache(maxsize=256)
def two_level_tiles(chip: Chip, problem: Problem) -> Tiling:
    """The plan of two levels whatever its block sizes. Raises ValueError if nothing fits the buffers."""
    plans = []
    for tile_m, tile_n, tile_k in _level_2(chip, problem):
        rows = _padded(max(problem.rows, 1), tile_m)
        keys = _padded(max(problem.kv_len, 1), tile_n)
        for block_m in range(tile_m, min(rows, MAX_BLOCK_M) + 1, tile_m):
            plan = _widest(chip, problem, block_m, keys, tile_m, tile_n, tile_k)
            if plan is None:
                break
            plans.append(plan)
    return quickest(plans) or _nothing_fits(chip, problem)


@lru_cache(maxsize=256)
def one_level_tiles(chip: Chip, problem: Problem) -> Tiling:
    """What one level of blocks would do, for comparison: the block is the tile, so every tile is handed over by itself. The tile that
    feeds the matrix unit cheapest among those that fit. Raises ValueError if none does."""
    for tile_m, tile_n, tile_k in _level_2(chip, problem, within=float("inf")):
        plan = Tiling(chip, problem, tile_m, tile_n, tile_m, tile_n, tile_k, MIN_VECTOR_ROWS)
        if plan.fits:
            return _with_vector_rows(plan)
    return _nothing_fits(chip, problem)


def kernel_tiles(chip: Chip, problem: Problem) -> KernelTiling:
    """The plan that our Triton kernel launches. Lengths count as the next power of two, so that a decode loop plans (and compiles) rarely.
    Raises ValueError if nothing fits the buffers."""
    rough = replace(problem, rows=power_of_two(problem.rows), kv_len=power_of_two(problem.kv_len))
    return replace(_kernel_tiles(chip, rough), problem=problem)


@lru_cache(maxsize=256)
def _kernel_tiles(chip: Chip, problem: Problem) -> KernelTiling:
    most_m, most_n = (min(most, max(16, length)) for most, length in zip(MAX_KERNEL_BLOCK, (problem.rows, problem.kv_len)))
    blocks = product(_sizes(most_m, 16), _sizes(most_n, 16))
    plans = [plan for block_m, block_n in blocks if (plan := kernel_plan(chip, problem, block_m, block_n)) and plan.fits]
    return quickest(plans) or _nothing_fits(chip, problem)


def kernel_plan(chip: Chip, problem: Problem, block_m: int, block_n: int) -> KernelTiling | None:
    """Level 2 within a block of these sizes: as many tiles as the compiler can be told, the cheapest to feed first; the first that fits,
    else the finest. None where no number of tiles fits L0."""
    cuts = sorted(((1 / (block_m // m) + 1 / (block_n // n), m, n) for m, n in product(LOOPS, LOOPS) if m * n in LOOPS))
    unit_rows, plan = -(-block_m // chip.vector_units), None
    for (_, m, n), loop in product(cuts, LOOPS):
        tile_m, tile_n, rows = block_m // m, block_n // n, unit_rows // loop
        if min(tile_m, tile_n) < 16 or rows < min(MIN_VECTOR_ROWS, unit_rows):
            continue
        depths = [k for k in _sizes(power_of_two(problem.head_dim), 16) if _fits_l0(chip, problem, tile_m, tile_n, k)]
        if depths:
            plan = KernelTiling(chip, problem, block_m, block_n, tile_m, tile_n, depths[-1], rows)
            if plan.fits:
                break
    return plan


def quickest(plans: Iterable[Tiling]) -> Tiling | None:
    """The rule of this file; None of no plans. Of equals the one with less traffic, then the one that feeds the matrix unit cheapest."""
    plans = list(plans)
    fewest = min((plan.busiest_core() for plan in plans), default=0)
    near = [plan for plan in plans if plan.busiest_core() <= NEAR * fewest]
    return min(near, default=None, key=lambda plan: (
        estimate(plan, plan.work, HAND_OVER_US).total_ms, plan.traffic(), 1 / plan.tile_m + 1 / plan.tile_n, -plan.vector_rows))


def _nothing_fits(chip: Chip, problem: Problem):
    raise ValueError(f"no tiling of head_dim {problem.head_dim} (v {problem.v_head_dim}) in {problem.element}-byte numbers fits "
                     f"{chip.name}'s buffers {chip.capacity._asdict()}; use a smaller head_dim or a 16-bit dtype")


def _sizes(limit: int, step: int) -> Iterator[int]:
    """step, 2 step, 4 step, ... up to the first that covers `limit`."""
    size = step
    while True:
        yield size
        if size >= limit:
            return
        size *= 2


def _fits_l0(chip: Chip, problem: Problem, m: int, n: int, k: int) -> bool:
    return all(2 * chip.aligned(name, size) <= getattr(chip.capacity, name) for name, size in (
        ("L0A", m * k * problem.element), ("L0B", k * n * problem.element), ("L0C", m * n * FP32)))


def _level_2(chip: Chip, problem: Problem, within: float = 2.0) -> Iterator[tuple[int, int, int]]:
    """(tile_m, tile_n, tile_k) that fit L0A, L0B and L0C twice, the cheapest to feed from L1 first.

    A tile reads tile_m + tile_n vectors of L1 for tile_m * tile_n sums, so its cost is 1/tile_m + 1/tile_n; and a longer tile_k is one
    copy instead of two. Tiles that cost more than `within` times the cheapest are left out: what level 1 gains by them Cube waits for.
    """
    m_step, n_step, k_step = chip.matrix_shape
    longest_k = _padded(problem.head_dim, k_step)
    found = []
    for m in _sizes(min(problem.rows, 256), m_step):
        for n in _sizes(min(max(problem.kv_len, 1), 512), n_step):
            ks = [k for k in _sizes(min(longest_k, 256), k_step) if _fits_l0(chip, problem, m, n, k)]
            if ks:
                found.append((1 / m + 1 / n, -ks[-1], (m, n, ks[-1])))
    yield from (tile for cost, _, tile in sorted(found) if cost <= within * min(found)[0])


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
    return _with_vector_rows(Tiling(chip, problem, block_m, width * tile_n, tile_m, tile_n, tile_k, MIN_VECTOR_ROWS))


def _with_vector_rows(plan: Tiling) -> Tiling:
    """As many rows a vector sub-tile as UB has room for, up to a vector unit's share of the block and a tile's rows."""
    share = min(plan.tile_m, -(-plan.block_m // plan.chip.vector_units))          # the tiling-mask serves up to tile_m rows
    rows, chosen = MIN_VECTOR_ROWS, plan
    while rows <= max(share, MIN_VECTOR_ROWS):
        wider = replace(plan, vector_rows=rows)
        if not wider.fits:
            break
        chosen, rows = wider, rows * 2
    return chosen
