"""The two-level schedule, step by step, on the model of a core: what the kernel does, where every number lies, and what it costs.

Order of a task (one head's block of query rows), with the matrix unit one level-1 block ahead of the vector units:

    Cube     QK0   QK1   PV0   QK2   PV1  ...        each through L0 in level-2 tiles; K or V of the next product is copied meanwhile
    Vector         softmax0    softmax1  ...         scores in, weights out, row maximum, sum and output rescaled in UB

`run_task` does it with real numbers (tests compare with the definition) or counts; `count` adds up a whole call, `estimate` turns counts
into times by the profile's rates. Times are a model's: no Ascend has confirmed them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hetero_attn_ascend.chip import Chip
from hetero_attn_ascend.core_model import Core, Counts, Piece, Ring
from hetero_attn_ascend.tiling import FP32, MASK_PASSES, SOFTMAX_PASSES, UPDATE_PASSES, Tiling, Work
from hetero_attn_ascend.tiling_mask import NOTHING, WHOLE, Window, block_edges, side, tiling_mask, visible

HAND_OVER_US = 1.0                      # what one wait between Cube and Vector costs: assumed, nobody has published it
NEG_INF = float("-inf")
DTYPES = {2: torch.float16, 4: torch.float32}


@dataclass
class TaskInputs:
    """q [rows, D], k [Skv, D], v [Skv, Dv] of one head, and the one mask; all None where the model only counts."""

    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    mask: torch.Tensor | None = None


class _Task:
    """The state of one task; its methods are the stages in the order in which run_task calls them."""

    def __init__(self, core: Core, plan: Tiling, inputs: TaskInputs, row_block: int, scale: float) -> None:
        problem = plan.problem
        self.core, self.plan, self.problem, self.inputs, self.scale = core, plan, problem, inputs, scale
        self.first = row_block * plan.block_m
        self.rows = min(plan.block_m, problem.rows - self.first)
        self.position = problem.position(self.first)
        self.dtype = DTYPES[problem.element]
        self.K, self.V = plan.padded_k, plan.padded_v
        self.l0a, self.l0b, self.l0c, self.p_ring = Ring(core), Ring(core), Ring(core), Ring(core)
        units = core.chip.vector_units
        self.unit_rows = -(-plan.block_m // units)
        # Of one vector unit; the numbers below hold all rows of the block, because both units do the same on their halves.
        self.held = [core.alloc("UB", (self.unit_rows, self.V), torch.float32)]
        self.held += [core.alloc("UB", (self.unit_rows,), torch.float32) for _ in range(3)]
        if core.execute:
            self.out = torch.zeros(self.rows, problem.v_head_dim)
            self.top = torch.full((self.rows, 1), NEG_INF)
            self.total = torch.zeros(self.rows, 1)

    def edges(self, row: int, rows: int, key: int, keys: int) -> tuple[Window | str, Window | str]:
        if self.problem.folded:                 # every row stands at the last key: one row's edge, for all of them
            return block_edges(self.position - key, 1, keys, self.problem.left, -1)
        return block_edges(self.position + row - key, rows, keys, self.problem.left, self.problem.right)

    def scores(self, q: Piece, k: Piece, key: int, keys: int) -> torch.Tensor | None:
        """QK of a level-1 block, tile by tile; what no row of a tile sees is not computed."""
        plan, core = self.plan, self.core
        scores = torch.full((self.rows, keys), NEG_INF) if core.execute else None
        for row in range(0, self.rows, plan.tile_m):
            m = min(plan.tile_m, self.rows - row)
            for column in range(0, keys, plan.tile_n):
                n = min(plan.tile_n, keys - column)
                edges = self.edges(row, m, key + column, n)
                if NOTHING in edges:
                    core.counts.tiles_skipped += 1
                    continue
                core.counts.tiles_masked += edges != (WHOLE, WHOLE)
                tile = self._product(
                    m, n, self.K, lambda k0, kn, row=row, m=m: None if q.data is None else q.data[row : row + m, k0 : k0 + kn],
                    lambda k0, kn, column=column, n=n: None if k.data is None else k.data[column : column + n, k0 : k0 + kn].T,
                )
                core.copy("L0C>GM", None, None, (m, n), FP32)
                if scores is not None:
                    scores[row : row + m, column : column + n] = tile.data[:m, :n]
        core.hand_over()
        return scores

    def softmax(self, scores: torch.Tensor | None, key: int, keys: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Weights in the call's dtype, and the factor that the output so far is multiplied by."""
        plan, core, problem = self.plan, self.core, self.problem
        weights = torch.empty(self.rows, keys, dtype=self.dtype) if core.execute else None
        factors = torch.empty(self.rows, 1) if core.execute else None
        in_ring, out_ring, mask_ring = Ring(core), Ring(core), Ring(core)
        stages = 0
        for row in range(0, self.rows, plan.vector_rows):
            m = min(plan.vector_rows, self.rows - row)
            masked = self._masked_columns(row, m, key, keys)
            x = in_ring.next("UB", (plan.vector_rows, plan.block_n), torch.float32)
            p = out_ring.next("UB", (plan.vector_rows, plan.block_n), self.dtype)
            mask = mask_ring.next("UB", (plan.vector_rows, plan.block_n), torch.uint8)
            core.copy("GM>UB", x, None if scores is None else scores[row : row + m], (m, keys), FP32)
            if masked:
                core.copy("GM>UB", None, None, (m, sum(n for _, n in masked)), 1)
            core.vector(m * keys * SOFTMAX_PASSES + m * sum(n for _, n in masked) * MASK_PASSES)
            if core.execute:
                tile = x.data[:m, :keys] * self.scale
                for column, n in masked:
                    mask.data[:m, column : column + n] = self._unseen(row, m, key + column, n)
                    tile[:, column : column + n].masked_fill_(mask.data[:m, column : column + n].bool(), NEG_INF)
                before = self.top[row : row + m]
                top = torch.maximum(before, tile.amax(1, keepdim=True))
                safe = torch.where(top == NEG_INF, 0.0, top)
                e = (tile - safe).exp()
                p.data[:m, :keys] = e.to(self.dtype)
                weights[row : row + m] = p.data[:m, :keys]
                factor = (before - safe).exp()
                self.total[row : row + m] = self.total[row : row + m] * factor + e.sum(1, keepdim=True)
                self.top[row : row + m] = top
                factors[row : row + m] = factor
            core.copy("UB>GM", None, None, (m, keys), problem.element)
            stages += 1
        for ring in (in_ring, out_ring, mask_ring):
            ring.close()
        core.hand_over()
        return weights, factors

    def output(self, weights: torch.Tensor | None, v: Piece, key: int, keys: int) -> torch.Tensor | None:
        """PV of a level-1 block: weights come through L1 one tile at a time, sums stay in L0C over all of the block's keys."""
        plan, core, Dv = self.plan, self.core, self.problem.v_head_dim
        partial = torch.zeros(self.rows, Dv) if core.execute else None
        for row in range(0, self.rows, plan.tile_m):
            m = min(plan.tile_m, self.rows - row)
            columns = [c for c in range(0, keys, plan.tile_n)
                       if NOTHING not in self.edges(row, m, key + c, min(plan.tile_n, keys - c))]
            if not columns:
                continue
            for feature in range(0, Dv, plan.tile_n):
                f = min(plan.tile_n, Dv - feature)
                total = self.l0c.next("L0C", (plan.tile_m, plan.tile_n), torch.float32)
                if core.execute:
                    total.data.zero_()
                for column in columns:
                    n = min(plan.tile_n, keys - column)
                    p = self.p_ring.next("L1", (plan.tile_m, plan.tile_n), self.dtype)
                    core.copy("GM>L1", p, None if weights is None else weights[row : row + m, column : column + n], (m, n),
                              self.problem.element)
                    self._product(
                        m, f, n, lambda k0, kn, p=p, m=m: None if p.data is None else p.data[:m, k0 : k0 + kn],
                        lambda k0, kn, c=column, f0=feature, f=f: None if v.data is None else v.data[c + k0 : c + k0 + kn, f0 : f0 + f],
                        total,
                    )
                core.copy("L0C>GM", None, None, (m, f), FP32)
                if partial is not None:
                    partial[row : row + m, feature : feature + f] = total.data[:m, :f]
        core.hand_over()
        return partial

    def update(self, partial: torch.Tensor | None, factors: torch.Tensor | None) -> None:
        plan, core, Dv = self.plan, self.core, self.problem.v_head_dim
        ring = Ring(core)
        for row in range(0, self.rows, plan.vector_rows):
            m = min(plan.vector_rows, self.rows - row)
            x = ring.next("UB", (plan.vector_rows, self.V), torch.float32)
            core.copy("GM>UB", x, None if partial is None else partial[row : row + m], (m, Dv), FP32)
            core.vector(m * Dv * UPDATE_PASSES)
            if core.execute:
                self.out[row : row + m] = self.out[row : row + m] * factors[row : row + m] + x.data[:m, :Dv]
        ring.close()

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        for ring in (self.l0a, self.l0b, self.l0c, self.p_ring):
            ring.close()
        self.core.copy("UB>GM", None, None, (self.rows, self.problem.v_head_dim), self.problem.element)
        self.core.free(*self.held)
        if not self.core.execute:
            return None, None
        empty = self.total == 0
        out = torch.where(empty, 0.0, self.out / torch.where(empty, 1.0, self.total))
        return out.to(self.dtype), (torch.where(empty, NEG_INF, self.top + self.total.log()))[:, 0]

    def _product(self, m, n, depth, left, right, total: Piece | None = None) -> Piece:
        """[m, depth] @ [depth, n] through L0, tile_k at a time, into a piece of L0C."""
        plan, core = self.plan, self.core
        into = total
        if into is None:
            into = self.l0c.next("L0C", (plan.tile_m, plan.tile_n), torch.float32)
            if core.execute:
                into.data.zero_()
        for k0 in range(0, depth, plan.tile_k):
            kn = min(plan.tile_k, depth - k0)
            a = self.l0a.next("L0A", (plan.tile_m, plan.tile_k), self.dtype)
            b = self.l0b.next("L0B", (plan.tile_k, plan.tile_n), self.dtype)
            core.copy("L1>L0A", a, left(k0, kn), (m, kn), self.problem.element)
            core.copy("L1>L0B", b, right(k0, kn), (kn, n), self.problem.element)
            sm, sn, sk = core.chip.matrix_shape
            core.counts.cube_flops += 2 * math.prod(-(-size // step) * step for size, step in ((m, sm), (n, sn), (kn, sk)))
            if core.execute:
                into.data += a.data.float() @ b.data.float()
        return into

    def _masked_columns(self, row: int, rows: int, key: int, keys: int) -> list[tuple[int, int]]:
        """(column, keys) of the tiles of these rows that an edge crosses, or that were not computed."""
        plan = self.plan
        found = []
        for column in range(0, keys, plan.tile_n):
            n = min(plan.tile_n, keys - column)
            if self.edges(row, rows, key + column, n) != (WHOLE, WHOLE):
                found.append((column, n))
        return found

    def _unseen(self, row: int, rows: int, key: int, keys: int) -> torch.Tensor:
        edges, distinct = self.edges(row, rows, key, keys), 1 if self.problem.folded else rows
        return ~visible(self.inputs.mask, edges, distinct, keys).expand(rows, keys)

def run_task(
    core: Core, plan: Tiling, inputs: TaskInputs, row_block: int, scale: float = 1.0, blocks: list[tuple[int, int]] | None = None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """out [rows, Dv] and lse [rows] of one task; (None, None) where the core only counts. blocks: those to visit in place of the plan's.
    Raises BufferOverflow."""
    task = _Task(core, plan, inputs, row_block, scale)
    problem, blocks = plan.problem, plan.blocks_of(row_block) if blocks is None else blocks
    kv = Ring(core)
    # The next task's queries are copied while this one computes: both have room, so both are allocated.
    q_next = core.alloc("L1", (plan.block_m, task.K), task.dtype)
    q = core.alloc("L1", (plan.block_m, task.K), task.dtype)
    core.copy("GM>L1", q, None if inputs.q is None else inputs.q[task.first : task.first + task.rows], (task.rows, problem.head_dim),
              problem.element)

    def load(source: torch.Tensor | None, features: int, block: tuple[int, int]) -> Piece:
        key, keys = block
        piece = kv.next("L1", (plan.block_n, max(task.K, task.V)), task.dtype)
        core.copy("GM>L1", piece, None if source is None else source[key : key + keys], (keys, features), problem.element)
        return piece

    waiting = None                                                  # the block whose weights are on their way to the matrix unit
    for block in [*blocks, None]:
        if block is not None:
            core.counts.level_1_blocks += 1
            scores = task.scores(q, load(inputs.k, problem.head_dim, block), *block)
        if waiting is not None:
            done, weights, factors = waiting
            partial = task.output(weights, load(inputs.v, problem.v_head_dim, done), *done)
            task.update(partial, factors)
        if block is not None:
            waiting = (block, *task.softmax(scores, *block))
    kv.close()
    core.free(q, q_next)
    return task.finish()


def run_head(plan: Tiling, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor, Counts]:
    """Every row block of one head with real numbers: out [rows, Dv], lse [rows], counts."""
    mask = tiling_mask(side(plan.tile_m, plan.tile_n))
    core = Core(plan.chip)
    parts = [run_task(core, plan, TaskInputs(q, k, v, mask), block, scale) for block in range(plan.row_blocks)]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts]), core.counts


def count(plan: Tiling) -> Counts:
    """The whole call, all heads and batches. Blocks that all rows see whole cost the same wherever they stand, so that of many three are
    run and the rest is that difference again; and row blocks that see the same pattern of keys are counted once."""
    head, seen = Counts(), {}
    for row_block in range(plan.row_blocks):
        first = row_block * plan.block_m
        rows = min(plan.block_m, plan.problem.rows - first)
        blocks = plan.blocks_of(row_block)
        position = plan.problem.position(first)
        edged = [block for block in blocks if _edges_of(plan, position, rows, block) != (WHOLE, WHOLE) or block[1] < plan.block_n]
        whole = [block for block in blocks if block not in edged] if len(edged) < len(blocks) else []
        key = (rows, len(whole), tuple((block[0] - position, block[1]) for block in edged))
        if key not in seen:
            seen[key] = _counted(plan, row_block, blocks, whole)
        head.add(seen[key])
    total = Counts()
    total.add(head, plan.problem.batch * plan.problem.heads)
    return total


def _edges_of(plan: Tiling, position: int, rows: int, block: tuple[int, int]) -> tuple[Window | str, Window | str]:
    problem = plan.problem
    return block_edges(position - block[0], 1 if problem.folded else rows, block[1], problem.left, -1 if problem.folded else problem.right)


def _counted(plan: Tiling, row_block: int, blocks: list[tuple[int, int]], whole: list[tuple[int, int]]) -> Counts:
    def run(some: list[tuple[int, int]]) -> Counts:
        core = Core(plan.chip, execute=False)
        run_task(core, plan, TaskInputs(), row_block, blocks=some)
        return core.counts

    if len(whole) <= 4:
        return run(blocks)
    kept = run([block for block in blocks if block not in whole[3:]])
    fewer = run([block for block in blocks if block not in whole[2:]])
    repeated = len(whole) - 3
    total = Counts()
    total.add(kept, 1 + repeated)
    total.add(fewer, -repeated)
    return total


@dataclass(frozen=True)
class Estimate:
    """Milliseconds that each resource is busy if the work is spread evenly; None = the profile has no rate for it."""

    cube_ms: float | None
    vector_ms: float | None
    l2_ms: float | None                         # everything that crosses between cores and L2
    memory_ms: float | None                     # q, k, v and out once
    hand_overs_ms: float                        # of the busiest core, at the cost assumed for one

    @property
    def total_ms(self) -> float:
        """The slowest resource with everything overlapped, and the waits, which nothing hides."""
        busy = [each for each in (self.cube_ms, self.vector_ms, self.l2_ms, self.memory_ms) if each is not None]
        return max(busy, default=0.0) + self.hand_overs_ms


def estimate(plan: Tiling, counts: Counts | Work, hand_over_us: float) -> Estimate:
    """counts: the model's, or the plan's closed forms. hand_over_us: what one wait between Cube and Vector costs."""
    chip, problem = plan.chip, plan.problem
    features = (problem.head_dim + problem.v_head_dim) * problem.element
    once = problem.batch * features * (problem.heads * problem.rows + problem.kv_heads * problem.kv_len)
    return Estimate(
        _ms(counts.cube_flops, chip.cube_flops, chip), _ms(counts.vector_ops, chip.vector_ops, chip),
        _ms(counts.global_bytes, chip.l2_bytes, chip), _ms(once, chip.memory_bytes, chip),
        plan.busiest_core() * hand_over_us / 1e3,
    )


def _ms(work: float, rate: float | None, chip: Chip) -> float | None:
    return None if rate is None else 1e3 * work / (rate * chip.cores)
