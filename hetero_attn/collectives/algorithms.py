"""Which algorithm does which collective how: one table, from the names that profiles and routes use to the steps in the files beside.

    one_shot, two_shot   direct.py    everybody to everybody: all at once, or in two hops with fewer bytes
    star                 star.py      through one root
    ring                 ring.py      from neighbour to neighbour
    tree                 tree.py      a binomial tree
    doubling             doubling.py  pairs exchange their sums, log2 N times
An algorithm that has nothing of its own for an operation takes its nearest: reduce_scatter and all_gather are one hop of two_shot already
(doubling's too), a star's broadcast is one_shot's and doubling's a tree's. All are generators of steps (see exchange.py) and leave the same
bits on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hetero_attn.collectives import direct, doubling, ring, star, tree
from hetero_attn.collectives.coding import Coding, Plain
from hetero_attn.collectives.direct import Steps
from hetero_attn.collectives.wire import Wire

NAMES = ("one_shot", "two_shot", "star", "ring", "tree", "doubling")
CODED = ("one_shot", "two_shot", "star")             # these encode each summand once; the others would encode at every hop
OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")
# Issued whole by their first step, so that an asynchronous call needs no thread.
SINGLE = {
    "all_reduce": {"one_shot"}, "reduce_scatter": {"one_shot", "two_shot", "doubling"},
    "all_gather": {"one_shot", "two_shot", "doubling"}, "broadcast": {"one_shot", "star"},
}
BYTES = Plain(torch.uint8)


def all_reduce(algorithm: str, wire: Wire, coding: Coding, flat: torch.Tensor) -> Steps:
    """Sum flat [n > 0], contiguous, on the CPU and not complex, over the ranks into flat, 16-bit floats in fp32 and rounded once."""
    coded: dict[str, Callable[..., Steps]] = {"one_shot": direct.one_shot, "two_shot": direct.two_shot, "star": star.all_reduce}
    if algorithm in coded:
        return coded[algorithm](wire, coding, flat)
    return {"ring": ring, "tree": tree, "doubling": doubling}[_uncoded(algorithm, coding)].all_reduce(wire, flat)


def reduce_scatter(algorithm: str, wire: Wire, coding: Coding, flat: torch.Tensor, counts: list[int]) -> Steps:
    """flat [sum of counts] of each rank -> the sum of this rank's piece [counts[rank]], a new tensor; flat as in all_reduce."""
    coded = {"one_shot": direct, "two_shot": direct, "doubling": direct, "star": star}
    if algorithm in coded:
        return coded[algorithm].reduce_scatter(wire, coding, flat, counts)
    return {"ring": ring, "tree": tree}[_uncoded(algorithm, coding)].reduce_scatter(wire, flat, counts)


def all_gather(algorithm: str, wire: Wire, own: torch.Tensor, counts: list[int], out: torch.Tensor) -> Steps:
    """own uint8 [counts[rank]] of each rank -> out uint8 [sum of counts > 0], in rank order."""
    if algorithm in ("one_shot", "two_shot", "doubling"):
        return direct.all_gather(wire, BYTES, own, counts, out)
    return {"star": star, "ring": ring, "tree": tree}[algorithm].all_gather(wire, own, counts, out)


def broadcast(algorithm: str, wire: Wire, flat: torch.Tensor, src: int) -> Steps:
    """src's flat uint8 [n > 0] into everybody's."""
    return {
        "one_shot": direct.broadcast, "star": direct.broadcast, "two_shot": direct.scattered_broadcast,
        "ring": ring.broadcast, "tree": tree.broadcast, "doubling": tree.broadcast,
    }[algorithm](wire, flat, src)


def _uncoded(algorithm: str, coding: Coding) -> str:
    if not coding.lossless:
        raise ValueError(f"algorithm {algorithm!r} would encode partial sums anew at every hop; with a codec use {', '.join(CODED)}")
    return algorithm
