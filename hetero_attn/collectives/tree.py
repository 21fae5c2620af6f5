"""tree: a binomial tree with its root at one rank, ceil(log2 N) hops up and as many down, the whole tensor on each.

Few hops and few messages for many ranks when tensors are short and a root that talks to all of them is too slow. Every rank adds its
children in the same order each time; 16-bit floats travel up as fp32 and are rounded once, at the root.
"""

from __future__ import annotations

import torch

from hetero_attn.collectives.coding import WIDER
from hetero_attn.collectives.direct import Steps, starts
from hetero_attn.collectives.wire import Pending, Wire, received

ROOT = 0


def family(rank: int, world_size: int) -> tuple[int | None, list[tuple[int, int]]]:
    """(parent or None for rank 0, children as (rank, end of its subtree)); a subtree is a run of ranks: [child, end)."""
    children, mask = [], 1
    while mask < world_size and not rank & mask:
        if rank + mask < world_size:
            children.append((rank + mask, min(rank + 2 * mask, world_size)))
        mask *= 2
    return (rank - mask if rank else None), children


def all_reduce(wire: Wire, flat: torch.Tensor) -> Steps:
    """Sum flat [n] over the ranks into flat."""
    total = yield from reduce(wire, flat)
    if wire.rank == ROOT:
        flat.copy_(total)
    yield from broadcast(wire, flat.view(torch.uint8), ROOT)


def reduce(wire: Wire, flat: torch.Tensor) -> Steps:
    """The sum [n] at the root, in flat's dtype; None elsewhere."""
    parent, children = family(wire.rank, wire.world_size)
    wide = WIDER.get(flat.dtype, flat.dtype)
    arrivals = [wire.expect(child, flat.numel() * wide.itemsize) for child, _ in children]
    total = flat.to(wide, copy=bool(children))
    for arrival in arrivals:
        yield Pending([arrival.work])
        total += arrival.payload.view(wide)
        arrival.release()
    if parent is None:
        wire.replenish()
        return total.to(flat.dtype)
    work = wire.send(total.view(torch.uint8), parent)
    wire.replenish()
    yield Pending([work])
    return None


def broadcast(wire: Wire, flat: torch.Tensor, src: int) -> Steps:
    """src's flat uint8 [n] into everybody's; the tree's root is src."""
    place = (wire.rank - src) % wire.world_size
    parent, children = family(place, wire.world_size)
    if parent is not None:
        arrival = wire.expect((parent + src) % wire.world_size, flat.numel())
        wire.replenish()
        yield Pending([arrival.work])
        flat.copy_(arrival.payload)
        arrival.release()
    yield Pending([wire.send(flat, (child + src) % wire.world_size) for child, _ in reversed(children)])       # the deepest first


def reduce_scatter(wire: Wire, flat: torch.Tensor, counts: list[int]) -> Steps:
    """flat [sum of counts] of each rank -> the sum of this rank's piece [counts[rank]], in flat's dtype: up whole, down in parts."""
    parent, children = family(wire.rank, wire.world_size)
    first = [*starts(counts), sum(counts)]
    end = max((end for _, end in children), default=wire.rank + 1)
    total = yield from reduce(wire, flat)
    begin = first[wire.rank]
    if parent is not None:
        total = flat.new_empty(first[end] - begin)                                             # the pieces of our subtree
        if total.numel():
            arrival = wire.expect(parent, total.numel() * total.element_size())
            wire.replenish()
            yield Pending([arrival.work])
            total.view(torch.uint8).copy_(arrival.payload)
            arrival.release()
    parts = [(child, total[first[child] - begin : first[end] - begin]) for child, end in reversed(children)]
    yield Pending([wire.send(part.view(torch.uint8), child) for child, part in parts if part.numel()])
    return total[: counts[wire.rank]].clone()


def all_gather(wire: Wire, own: torch.Tensor, counts: list[int], out: torch.Tensor) -> Steps:
    """own uint8 [counts[rank]] of each rank -> out [sum of counts], in rank order: collected at rank 0, then broadcast."""
    parent, children = family(wire.rank, wire.world_size)
    first = [*starts(counts), sum(counts)]
    out[first[wire.rank] : first[wire.rank + 1]].copy_(own)
    arrivals = {}
    for child, end in children:
        if first[end] > first[child]:
            arrivals[child, end] = wire.expect(child, first[end] - first[child])
    yield Pending(received(arrivals.values()))
    for (child, end), arrival in arrivals.items():
        out[first[child] : first[end]].copy_(arrival.payload)
        arrival.release()
    end = max((end for _, end in children), default=wire.rank + 1)
    collected = out[first[wire.rank] : first[end]]
    if parent is not None and collected.numel():
        work = wire.send(collected, parent)
        wire.replenish()
        yield Pending([work])
    yield from broadcast(wire, out, ROOT)
