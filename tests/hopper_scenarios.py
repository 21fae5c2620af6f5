"""What a group of emulated ranks is put through, with everything late that may be late: for the right kernels and for those with a fault.

Each scenario runs in every rank and returns a complaint or None. One rank is late: it writes its summand and calls 20 ms after the others,
and its blocks sleep before the stores that nobody has released are seen. Results are looked at as soon as the call returns, not when all
ranks are done.
"""

import time

import torch
from hopper_emulated import Node, emulated, written

from hetero_attn.communicator import CommunicatorError, add_and_norm
from hetero_attn.testing.rank_threads import on_threads
from hetero_attn.testing.simt import forget

LATE_S, TIMEOUT_S, EPS = 0.02, 15.0, 1e-5


def summands(world, shape, turn, dtype):
    """Every rank's x of a turn: sums of 16-bit floats that cancel, so that a sum in too few bits shows."""
    generator = torch.Generator().manual_seed(turn)
    parts = torch.randn(world, *shape, generator=generator)
    if world > 1:
        parts[1] -= 64 * parts[0]
        parts[0] *= 64
    return parts.to(dtype)


def late(communicator, lates):
    if communicator.rank == lates:
        time.sleep(LATE_S)


def fused(communicator, node, lates, *, rows=7, width=40, turns=3, weight_offset=0.0, post=False, dtype=torch.bfloat16, uneven=False):
    """all_reduce_rms_norm, several calls in one buffer, against the definition on the whole."""
    world, rank = communicator.world_size, communicator.rank
    if uneven and rank:
        held = communicator.empty((rank, 64), torch.uint8)        # so that the ranks' tensors lie at unlike offsets
    x, own = communicator.empty((rows, width), dtype), communicator.rows(rows)
    residual = torch.linspace(-1, 1, rows * width).view(rows, width).to(dtype)
    shard, weight = residual[own].clone(), torch.linspace(0.5, 1.5, width)
    post_weight = torch.linspace(1.5, 0.5, width) if post else None
    for turn in range(turns):
        parts = summands(world, (rows, width), turn, dtype)
        late(communicator, lates)
        written(node, rank, x, parts[rank])
        normed, _ = communicator.all_reduce_rms_norm(x, shard, weight, EPS, site=f"layers.{turn}.o_proj", weight_offset=weight_offset,
                                                     post_weight=post_weight)
        found = normed.clone()
        total = parts.float().sum(0).to(dtype)
        want = add_and_norm(total, residual, weight, EPS, weight_offset, post_weight)
        if not torch.equal(shard, residual[own]):
            return f"turn {turn}: residual off by {(shard.float() - residual[own].float()).abs().max():.3g}"
        off = (found.float() - want.float()).abs()
        if not (off <= 2.0**-7 * want.float().abs() + 1e-6).all():            # a unit in the last place: the mean's order of summing
            return f"turn {turn}: normed rows {sorted(set((off > 2.0**-7 * want.float().abs()).nonzero()[:, 0].tolist()))} are off"
    if uneven and rank:
        del held
    return None


def all_reduce(communicator, node, lates, *, elements=1000, turns=4, dtype=torch.bfloat16, symmetric=True):
    """In place where x is symmetric; an x that is not takes the one-shot form when it is short."""
    world, rank = communicator.world_size, communicator.rank
    x = communicator.empty((elements,), dtype) if symmetric else torch.empty(elements, dtype=dtype)
    for turn in range(turns):
        parts = summands(world, (elements,), turn, dtype)
        late(communicator, lates if turn % 2 else (lates + 1) % world)
        written(node, rank, x, parts[rank]) if symmetric else x.copy_(parts[rank])
        found = communicator.all_reduce(x).clone()
        if not torch.equal(found, parts.float().sum(0).to(dtype)):
            return f"turn {turn}: {int((found != parts.float().sum(0).to(dtype)).sum())} of {elements} sums are wrong"
    return None


def scatter_and_gather(communicator, node, lates, *, rows=7, width=64, turns=3, dtype=torch.bfloat16):
    """x is written anew as soon as reduce_scatter has returned; all_gather's pieces are of unlike sizes."""
    world, rank = communicator.world_size, communicator.rank
    x, own = communicator.empty((rows, width), dtype), communicator.rows(rows)
    for turn in range(turns):
        parts = summands(world, (rows, width), turn, dtype)
        late(communicator, lates)
        written(node, rank, x, parts[rank])
        found = communicator.reduce_scatter(x)
        written(node, rank, x, torch.full((rows, width), 1000.0, dtype=dtype))
        if not torch.equal(found, parts.float().sum(0).to(dtype)[own]):
            return f"turn {turn}: reduce_scatter is wrong"
        late(communicator, lates)
        sizes = [16 * each + 8 for each in range(world)]
        pieces = [torch.full((size, 4), float(turn + each), dtype=dtype) for each, size in enumerate(sizes)]
        gathered = communicator.all_gather(pieces[rank], sizes=sizes).clone()
        if not torch.equal(gathered, torch.cat(pieces)):
            return f"turn {turn}: all_gather is wrong"
    return None


def absent(communicator, node, lates, **options):
    """The late rank never comes: the others say so, name it and its slot, within the time-out."""
    if communicator.rank == lates:
        return None
    began = time.monotonic()
    try:
        shard = torch.zeros(communicator.row_counts(4)[communicator.rank], 16)
        communicator.all_reduce_rms_norm(torch.ones(4, 16), shard, torch.ones(16), EPS, site="layers.0.o_proj")
    except CommunicatorError as error:
        took, text = time.monotonic() - began, str(error)
        wanted = (f"rank {lates} did not come", "slot ", "layers.0.o_proj")
        missing = [each for each in wanted if each not in text]
        return f"the error lacks {missing}: {text}" if missing else f"it took {took:.1f} s" if took > 8 else None
    return "no error"


def complaints(scenario, world, *, lates=None, multicast=True, door=None, timeout_s=TIMEOUT_S, stage=256, ctas=2, options=None,
               **node_options):
    """The scenario with each rank late in turn (or `lates` alone): what the ranks complain of."""
    found = []
    for each in range(world) if lates is None else [lates]:
        forget()
        node = Node(world, multicast=multicast, stall_s={each: LATE_S}, **node_options)
        changes = {"symmetric_stage_bytes": stage, "overlap.communication_units": ctas}

        def run(communicator, node=node, late_rank=each):
            communicator.timeout_s = timeout_s
            return scenario(communicator, node, late_rank, **(options or {}))

        def wrap(base, node=node, changes=changes):
            return emulated(base, node, door=door, **changes)

        outcomes = on_threads(run, world, wrap=wrap)
        found += [f"rank {rank}: {each.result or each.text}" for rank, each in enumerate(outcomes) if each.result or each.error]
    return found
