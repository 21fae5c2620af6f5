"""doubling (recursive doubling): in step k the ranks whose numbers differ in bit k exchange what they have summed so far, log2 N steps.

Few messages, log2 N a rank where one_shot sends N-1, and few hops; the whole tensor travels at each. For short tensors between many ranks,
where messages cost more than bytes: one row between 8 ranks. Both of a pair add the lower rank's sum and the higher one's, in that order,
so that all hold the same bits; 16-bit floats travel as fp32 and are rounded once. Ranks beyond the largest power of two hand their
summand to a partner before, and get the result after.
"""

from __future__ import annotations

import torch

from hetero_attn.collectives.coding import WIDER
from hetero_attn.collectives.direct import Steps
from hetero_attn.collectives.wire import Pending, Wire


def power_of_two(world_size: int) -> int:
    """The largest one that is not above world_size: so many ranks take part in the steps."""
    return 1 << (world_size.bit_length() - 1)


def all_reduce(wire: Wire, flat: torch.Tensor) -> Steps:
    """Sum flat [n] over the ranks into flat."""
    rank, taking_part, wide = wire.rank, power_of_two(wire.world_size), WIDER.get(flat.dtype, flat.dtype)
    total, nbytes, beyond = flat.to(wide), flat.numel() * wide.itemsize, rank + taking_part
    if rank >= taking_part:
        partner = rank - taking_part
        result = wire.expect(partner, flat.numel() * flat.element_size())
        work = wire.send(total.view(torch.uint8), partner)
        wire.replenish()
        yield Pending([work, result.work])
        flat.copy_(result.payload.view(flat.dtype))
        result.release()
        return
    partners = [rank ^ (1 << step) for step in range(taking_part.bit_length() - 1)]
    first = wire.expect(beyond, nbytes) if beyond < wire.world_size else None
    arrivals = [wire.expect(partner, nbytes) for partner in partners]
    if first is not None:
        yield Pending([first.work])
        total = total + first.payload.view(wide)
        first.release()
    for step, (partner, arrival) in enumerate(zip(partners, arrivals), 1):
        work = wire.send(total.view(torch.uint8), partner)
        wire.replenish()
        yield Pending([arrival.work, work])
        theirs = arrival.payload.view(wide)
        into = flat if step == len(partners) and flat.dtype == wide else None              # the last sum where it is wanted
        total = torch.add(*((total, theirs) if rank < partner else (theirs, total)), out=into)
        arrival.release()
    if total is not flat:
        flat.copy_(total)
    if first is not None:
        yield Pending([wire.send(flat.view(torch.uint8), beyond)])
