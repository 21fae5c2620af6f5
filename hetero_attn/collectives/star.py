"""star: the ranks push to one root, which receives from all at once, and get the result back from it.

Two hops whatever the number of ranks and the fewest messages of all, but everything passes through the root's link: 2(N-1)·M bytes.
For short messages where a message costs more than its bytes, and where peers cannot reach one another. Sums are in rank order.
"""

from __future__ import annotations

import torch

from hetero_attn.collectives.coding import SUM, Coding
from hetero_attn.collectives.direct import Steps, starts
from hetero_attn.collectives.wire import Pending, Wire, received, release

ROOT = 0


def all_reduce(wire: Wire, coding: Coding, flat: torch.Tensor) -> Steps:
    """Sum flat [n] over the ranks into flat."""
    count = flat.numel()
    if wire.rank != ROOT:
        arrival = wire.expect(ROOT, coding.size(0, count, SUM))
        yield from push(wire, coding, flat)
        yield Pending([arrival.work])
        flat.copy_(coding.decode(arrival.payload, ROOT, 0, count, SUM))
        arrival.release()
        return
    total = yield from sum_at_root(wire, coding, flat)
    payload = coding.encode(total, 0, SUM)
    yield Pending([wire.send(payload, peer) for peer in wire.peers])
    flat.copy_(total if coding.lossless else coding.decode(payload, ROOT, 0, count, SUM))


def reduce_scatter(wire: Wire, coding: Coding, flat: torch.Tensor, counts: list[int]) -> Steps:
    """flat [sum of counts] of each rank -> the sum of this rank's piece [counts[rank]], in flat's dtype."""
    own, first = counts[wire.rank], starts(counts)
    if wire.rank != ROOT:
        arrival = wire.expect(ROOT, coding.size(first[wire.rank], own, SUM)) if own else None
        yield from push(wire, coding, flat)
        if arrival is None:
            return flat[:0].clone()
        yield Pending([arrival.work])
        piece = coding.decode(arrival.payload, ROOT, first[wire.rank], own, SUM).to(flat.dtype, copy=True)
        arrival.release()
        return piece
    total = yield from sum_at_root(wire, coding, flat)
    # All are encoded before one is sent: where a codec refuses one rank's piece, every rank is to hear of it.
    payloads = coding.encode_pieces(total[own:], counts[ROOT + 1 :], first[ROOT + 1 :], SUM)                  # of ranks 1 .. N-1
    yield Pending([wire.send(payloads[peer - 1], peer) for peer in wire.peers if counts[peer]])
    return total[:own].clone()


def push(wire: Wire, coding: Coding, flat: torch.Tensor) -> Steps:
    """A rank's summand on its way to the root."""
    work = wire.send(coding.encode(flat, 0), ROOT)
    wire.replenish()
    yield Pending([work])


def sum_at_root(wire: Wire, coding: Coding, flat: torch.Tensor) -> Steps:
    """The root's sum [n] of what all ranks pushed and its own flat [n], in flat's dtype."""
    count = flat.numel()
    arrivals = {peer: wire.expect(peer, coding.size(0, count)) for peer in wire.peers}
    yield Pending(received(arrivals.values()))
    payloads = {ROOT: coding.encode(flat, 0)} | {peer: arrival.payload for peer, arrival in arrivals.items()}
    total = coding.total([payloads[rank] for rank in range(wire.world_size)], 0, count, flat.dtype)
    release(arrivals.values())
    wire.replenish()
    return total


def all_gather(wire: Wire, own: torch.Tensor, counts: list[int], out: torch.Tensor) -> Steps:
    """own uint8 [counts[rank]] of each rank -> out [sum of counts], in rank order."""
    pieces = out.split(counts)
    if wire.rank != ROOT:
        arrival = wire.expect(ROOT, sum(counts))
        if own.numel():
            work = wire.send(own, ROOT)
            wire.replenish()
            yield Pending([work])
        yield Pending([arrival.work])
        out.copy_(arrival.payload)
        arrival.release()
        return
    pieces[ROOT].copy_(own)
    arrivals = {peer: wire.expect(peer, counts[peer]) for peer in wire.peers if counts[peer]}
    yield Pending(received(arrivals.values()))
    for peer, arrival in arrivals.items():
        pieces[peer].copy_(arrival.payload)
    release(arrivals.values())
    works = [wire.send(out, peer) for peer in wire.peers]
    wire.replenish()
    yield Pending(works)
