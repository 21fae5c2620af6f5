"""one_shot and two_shot: every rank talks to every other at once, one latency a hop.

one_shot gives everybody everything and lets each sum alone: the fewest hops, (N-1)·M bytes a rank. two_shot sums a piece at each rank and
gives the sums to everybody: one hop more, 2(N-1)/N·M bytes. Sums are taken in rank order, so all ranks hold the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from typing import Any

import torch

from hetero_attn.collectives.coding import SUM, Coding
from hetero_attn.collectives.wire import AHEAD_BYTES, Arrival, Pending, Wire, received, release
from hetero_attn.communicator import shard_counts

RUNS_MOST = 8                                        # of one payload: each costs what a message costs
Steps = Generator[Any, None, Any]                    # yields work objects, returns the operation's result
Expected = dict[int, Arrival]                        # sender -> its message


def starts(counts: list[int]) -> list[int]:
    """Where each piece begins: [0, counts[0], counts[0] + counts[1], ...]."""
    return [0, *itertools.accumulate(counts)][: len(counts)]


def one_shot(wire: Wire, coding: Coding, flat: torch.Tensor) -> Steps:
    """Sum flat [n] over the ranks into flat. A long one travels in runs: a run is summed while those behind it are on their way, which
    hides all of the coding and adding but the last run's (512 rows of 4096 in 4 bits, 2 ranks, 300 Mbit/s: 41 -> 35 ms)."""
    counts = runs_of(coding, flat.numel())
    first, runs = starts(counts), flat.split(counts)
    arrivals = [{peer: wire.expect(peer, coding.size(at, count)) for peer in wire.peers} for at, count in zip(first, counts)]
    own, works = [], []
    for payload in coding.encode_runs(flat, counts, first):
        own.append(payload)
        works.append([wire.send(payload, peer) for peer in wire.peers])
    wire.replenish()
    for run, at, coming, mine, sent in zip(runs, first, arrivals, own, works):
        yield Pending(received(coming.values()) + sent)
        payloads = {wire.rank: mine} | {peer: arrival.payload for peer, arrival in coming.items()}
        run.copy_(coding.total([payloads[rank] for rank in range(wire.world_size)], at, run.numel(), flat.dtype))
        release(coming.values())


def runs_of(coding: Coding, count: int) -> list[int]:
    """How many values go into each message of a long payload: runs of about AHEAD_BYTES, RUNS_MOST at most, none cut within a grain."""
    runs = min(RUNS_MOST, -(-coding.size(0, count) // AHEAD_BYTES))
    each = -(-count // (runs * coding.grain)) * coding.grain
    return [each] * (count // each) + ([count % each] if count % each else [])


def two_shot(wire: Wire, coding: Coding, flat: torch.Tensor) -> Steps:
    """Sum flat [n] over the ranks into flat."""
    counts = shard_counts(wire.world_size, flat.numel())
    pieces = expect_pieces(wire, coding, counts)
    sums = expect_all(wire, coding, counts)          # posted a hop early: they are sent as soon as the pieces are there
    own = yield from reduce_scatter(wire, coding, flat, counts, pieces)
    yield from all_gather(wire, coding, own, counts, flat, sums)


def expect_pieces(wire: Wire, coding: Coding, counts: list[int]) -> Expected:
    """Every peer's summand of this rank's piece."""
    own = counts[wire.rank]
    nbytes = coding.size(starts(counts)[wire.rank], own) if own else 0
    return {peer: wire.expect(peer, nbytes) for peer in wire.peers} if own else {}


def expect_all(wire: Wire, coding: Coding, counts: list[int]) -> Expected:
    """Every peer's whole piece."""
    first = starts(counts)
    return {peer: wire.expect(peer, coding.size(first[peer], counts[peer], SUM)) for peer in wire.peers if counts[peer]}


def reduce_scatter(wire: Wire, coding: Coding, flat: torch.Tensor, counts: list[int], arrivals: Expected | None = None) -> Steps:
    """flat [sum of counts] of each rank -> the sum of this rank's piece [counts[rank]], in flat's dtype."""
    arrivals = expect_pieces(wire, coding, counts) if arrivals is None else arrivals
    rank, count, first = wire.rank, counts[wire.rank], starts(counts)
    payloads = coding.encode_pieces(flat, counts, first)
    works = [wire.send(payloads[peer], peer) for peer in wire.peers if counts[peer]]
    wire.replenish()
    yield Pending(received(arrivals.values()) + works)
    if not count:
        return flat[:0].clone()
    of = {rank: payloads[rank]} | {peer: arrival.payload for peer, arrival in arrivals.items()}
    total = coding.total([of[each] for each in range(wire.world_size)], first[rank], count, flat.dtype)
    release(arrivals.values())
    return total


def all_gather(
    wire: Wire, coding: Coding, own: torch.Tensor, counts: list[int], out: torch.Tensor, arrivals: Expected | None = None
) -> Steps:
    """own [counts[rank]] of each rank -> out [sum of counts], in rank order. own may lie in out."""
    arrivals = expect_all(wire, coding, counts) if arrivals is None else arrivals
    first = starts(counts)
    payload = coding.encode(own, first[wire.rank], SUM) if own.numel() else None
    works = [wire.send(payload, peer) for peer in wire.peers] if payload is not None else []
    wire.replenish()
    yield Pending(received(arrivals.values()) + works)
    payloads = {peer: arrival.payload for peer, arrival in arrivals.items()} | ({} if payload is None else {wire.rank: payload})
    parts = [coding.decode(payloads[rank], rank, first[rank], counts[rank], SUM) for rank in sorted(payloads)]
    _join(parts, own, out)
    release(arrivals.values())


def _join(parts: list[torch.Tensor], own: torch.Tensor, out: torch.Tensor) -> None:
    """Write parts one after the other into out; `own` may lie in it, where torch.cat would refuse to read and write the same memory."""
    if own.untyped_storage().data_ptr() == out.untyped_storage().data_ptr():
        out.copy_(torch.cat(parts))
    else:
        torch.cat(parts, out=out)


def broadcast(wire: Wire, flat: torch.Tensor, src: int) -> Steps:
    """src's flat uint8 [n] into everybody's, from src to each: one hop."""
    if wire.rank == src:
        yield Pending([wire.send(flat, peer) for peer in wire.peers])
        return
    arrival = wire.expect(src, flat.numel())
    wire.replenish()
    yield Pending([arrival.work])
    flat.copy_(arrival.payload)
    arrival.release()


def scattered_broadcast(wire: Wire, flat: torch.Tensor, src: int) -> Steps:
    """src's flat uint8 [n] into everybody's: src deals out pieces, and each rank passes its own on to the others."""
    counts = shard_counts(wire.world_size, flat.numel())
    pieces = flat.split(counts)
    if wire.rank == src:
        works = [wire.send(pieces[peer], peer) for peer in wire.peers if counts[peer]]
        works += [wire.send(pieces[src], peer) for peer in wire.peers if counts[src]]
        yield Pending(works)
        return
    mine = wire.expect(src, counts[wire.rank]) if counts[wire.rank] else None
    arrivals = {peer: wire.expect(peer, counts[peer]) for peer in wire.peers if counts[peer]}
    wire.replenish()
    works = []
    if mine is not None:
        yield Pending([mine.work])
        works = [wire.send(mine.payload, peer) for peer in wire.peers if peer != src]
        pieces[wire.rank].copy_(mine.payload)
    yield Pending(received(arrivals.values()) + works)
    for peer, arrival in arrivals.items():
        pieces[peer].copy_(arrival.payload)
    release([*arrivals.values(), mine] if mine is not None else list(arrivals.values()))
