"""ring: every rank talks to its two neighbours only, N-1 steps to sum and N-1 to hand round; each step carries one N-th.

The fewest bytes on every link at once, 2(N-1)/N·M, and the most hops, 2(N-1): for large tensors on links that many streams at once would
choke. The sum of a piece begins behind its owner and ends with it, always in that order; 16-bit floats travel as fp32 until it is complete.
"""

from __future__ import annotations

import itertools

import torch

from hetero_attn.collectives.coding import WIDER
from hetero_attn.collectives.direct import Steps
from hetero_attn.collectives.wire import Pending, Wire
from hetero_attn.communicator import shard_counts


def all_reduce(wire: Wire, flat: torch.Tensor) -> Steps:
    """Sum flat [n] over the ranks into flat."""
    counts = shard_counts(wire.world_size, flat.numel())
    own = yield from reduce_scatter(wire, flat, counts)
    item = flat.element_size()
    yield from all_gather(wire, own.view(torch.uint8), [count * item for count in counts], flat.view(torch.uint8))


def reduce_scatter(wire: Wire, flat: torch.Tensor, counts: list[int]) -> Steps:
    """flat [sum of counts] of each rank -> the sum of this rank's piece [counts[rank]], in flat's dtype.

    Piece p sets out at rank p+1 and collects one summand a step until it comes to rank p.
    """
    left, right = (wire.rank - 1) % wire.world_size, (wire.rank + 1) % wire.world_size
    pieces, wide = flat.split(counts), WIDER.get(flat.dtype, flat.dtype)
    travelling = [(wire.rank - step - 1) % wire.world_size for step in range(wire.world_size)]         # the last is our own
    arrivals = {piece: wire.expect(left, counts[piece] * wide.itemsize) for piece in travelling[1:] if counts[piece]}
    total = pieces[travelling[0]].to(wide)
    for piece, coming in itertools.pairwise(travelling):
        works = [wire.send(total.view(torch.uint8), right)] if counts[piece] else []
        wire.replenish()
        if coming in arrivals:
            yield Pending([arrivals[coming].work, *works])
            total = arrivals[coming].payload.view(wide) + pieces[coming].to(wide)
            arrivals[coming].release()
        else:
            yield Pending(works)
            total = pieces[coming].to(wide)
    return total.to(flat.dtype)


def all_gather(wire: Wire, own: torch.Tensor, counts: list[int], out: torch.Tensor) -> Steps:
    """own uint8 [counts[rank]] of each rank -> out [sum of counts], in rank order."""
    left, right = (wire.rank - 1) % wire.world_size, (wire.rank + 1) % wire.world_size
    pieces = out.split(counts)
    travelling = [(wire.rank - step) % wire.world_size for step in range(wire.world_size)]             # the first is our own
    arrivals = {piece: wire.expect(left, counts[piece]) for piece in travelling[1:] if counts[piece]}
    pieces[wire.rank].copy_(own)
    for piece, coming in itertools.pairwise(travelling):
        works = [wire.send(pieces[piece], right)] if counts[piece] else []
        wire.replenish()
        if coming in arrivals:
            yield Pending([arrivals[coming].work, *works])
            pieces[coming].copy_(arrivals[coming].payload)
            arrivals[coming].release()
        else:
            yield Pending(works)


def broadcast(wire: Wire, flat: torch.Tensor, src: int) -> Steps:
    """src's flat uint8 [n] into everybody's: N pieces pass along the chain of ranks behind src, each as soon as it is there."""
    counts = [count for count in shard_counts(wire.world_size, flat.numel()) if count]
    left, right = (wire.rank - 1) % wire.world_size, (wire.rank + 1) % wire.world_size
    arrivals = [wire.expect(left, count) for count in counts] if wire.rank != src else []
    works = []
    for index, piece in enumerate(flat.split(counts)):
        if arrivals:
            yield Pending([arrivals[index].work])
            piece.copy_(arrivals[index].payload)
            arrivals[index].release()
        if right != src:
            works.append(wire.send(piece, right))
        wire.replenish()
    yield Pending(works)
