"""Timing a loaded model's pieces and sums, and whole steps by given cuts: what the cost model is made of, and what it is checked by.

All ranks measure together and the slowest counts. One layer stands for all: of each piece, the median of a few calls at a few numbers of
rows, with nothing else going on. Steps run a few layers, and contenders take turns, so that a machine that drifts drifts for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.parallel.schedule import Block, CommunicationLane, run_blocks
from hetero_attn.parallel.schedule_cost import CODED_SUM, KINDS, Costs, Curve
from hetero_attn.parallel.schedule_order import INNER, PRODUCT, SUM, Cut

QUICK_ROWS = (32, 128, 256)
THOROUGH_ROWS = (16, 32, 64, 128, 256, 512, 1024)
REPEATS, LIMIT_S = 5, 0.5                            # calls of a piece, and the seconds after which fewer will do
EFFICIENCY_ROWS = 256                                # a cut this short, or the longest measured, shows how much of a gain is real
PATIENCE_S = 2.0                                     # no piece is tried at more rows once it takes so long
SITE = "tune"


def measure_costs(
    decoder, rows: Sequence[int] = THOROUGH_ROWS, *, use_codec: Callable[[bool], None] | None = None, repeats: int = REPEATS
) -> Costs:
    """The costs of `decoder`'s blocks and sums at these numbers of rows. use_codec: as Auto has it; with it coded sums are timed too."""
    layer = decoder.layers[len(decoder.layers) // 2]
    blocks = layer.blocks(decoder.norm)
    points: dict[str, list[tuple[int, float]]] = {}
    pair_s, timed = 0.0, _Timer(decoder, repeats)
    for count in sorted({min(each, decoder.config.context_length // 2 or 1) for each in rows}):
        took, pair_s = _pieces(decoder, blocks, count, timed)
        for name, coded in ((SUM, False), (CODED_SUM, True)):
            if use_codec is not None:
                use_codec(coded)
            elif coded:
                continue
            took[name] = timed(partial(_sum, decoder.communicator, blocks[0], _hidden(decoder, count)))
        for name, seconds in took.items():
            points.setdefault(name, []).append((count, seconds))
        if max(took.values()) > PATIENCE_S:
            break
    curves = {}
    for name, own in points.items():
        if name == f"{KINDS[0]}_{INNER}":            # the pairs of these very measurements are counted apart
            own = [(count, max(seconds - pair_s * count * (count + 1) / 2, 0.0)) for count, seconds in own]
        curves[name] = Curve(own)
    if use_codec is not None:
        use_codec(False)
    costs, count = Costs(curves, pair_s), min(count, EFFICIENCY_ROWS)
    return replace(costs, efficiency=_efficiency(decoder, costs, count))


def _pieces(decoder, blocks: Sequence[Block], count: int, timed: _Timer) -> tuple[dict[str, float], float]:
    """Seconds of each piece for `count` rows of a new sequence, and of attention for a query and key more."""
    hidden, took = _hidden(decoder, count), {}
    near, far = _context(decoder, count, 0), _context(decoder, count, count)
    for kind, block in zip(KINDS, blocks):
        took[f"{kind}_{INNER}"] = timed(partial(block.inner, hidden, near))
        took[f"{kind}_{PRODUCT}"] = timed(partial(block.product, block.inner(hidden, near)))
    longer = timed(partial(blocks[0].inner, hidden, far))                   # as many further keys for every row
    return took, max((longer - took[f"{KINDS[0]}_{INNER}"]) / count**2, 0.0)


def _efficiency(decoder, costs: Costs, count: int) -> float:
    """How much of the gain that the costs promise two parts of `count` rows is there on the clock, 0 to 1; 1 where they promise none."""
    layers, cuts = min(2, len(decoder.layers)), {"plain": Cut.at(count), "halves": Cut.at(count, [max(count // 2, 1)])}
    promised = [costs.simulated(cut, [count], [count], layers).seconds for cut in cuts.values()]
    times = [median(own) for own in time_cuts(decoder, cuts, 3, layers=layers).values()]
    if count < 2 or promised[1] >= promised[0]:
        return 1.0
    return min(max((times[0] - times[1]) / (promised[0] - promised[1]), 0.0), 1.0)


def measure_whole_sum(decoder, rows: Sequence[int]) -> dict[int, float]:
    """rows -> seconds of a sum with the residual whole on every rank: all-reduce, add, norm."""
    communicator, norm, timed = decoder.communicator, decoder.norm, _Timer(decoder, REPEATS)

    def call(hidden: torch.Tensor) -> None:
        norm(hidden + communicator.all_reduce(communicator.empty(hidden.shape, hidden.dtype).copy_(hidden), site=SITE))

    return {count: timed(partial(call, _hidden(decoder, count))) for count in rows}


def time_cuts(decoder, cuts: Mapping[str, Cut], rounds: int, *, layers: int | None = None) -> dict[str, list[float]]:
    """Seconds of the first `layers` layers (None: all) by each of some cuts of one prompt's T rows: name -> one number a round.

    Contenders take turns, every other round backwards, after a round that does not count.
    """
    blocks = decoder.blocks()[: None if layers is None else 2 * layers]
    names = list(cuts)
    total = cuts[names[0]].total
    x, (rotary, step, cache) = _hidden(decoder, total), _context(decoder, total, 0)
    contexts = {
        name: [(tuple(each[rows.start : rows.stop] for each in rotary), step.part(rows), cache) for rows in cut.parts]
        for name, cut in cuts.items()
    }
    timed = _Timer(decoder, 1)

    def embed(rows: range, lane: CommunicationLane) -> Callable[[], torch.Tensor]:
        return lane.start("embed", 0, "all_reduce", x[rows.start : rows.stop].clone(), site=SITE)

    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names if number % 2 else reversed(names):
            call = partial(run_blocks, blocks, decoder.layers[0].input_norm, embed, contexts[name], cuts[name], decoder.communicator)
            seconds = timed(call, warm=False)
            if number:
                found[name].append(seconds)
    return found


class _Timer:
    """The slowest rank's seconds of a call, the same number on every rank."""

    def __init__(self, decoder, repeats: int) -> None:
        self._decoder, self._repeats = decoder, repeats

    @torch.no_grad()
    def __call__(self, call: Callable[[], Any], *, warm: bool = True) -> float:
        communicator = self._decoder.communicator
        with self._decoder.choosing():
            tries: list[float] = []
            if warm:
                call()
            while True:
                communicator.barrier(site=SITE)
                tries.append(self._slowest(communicator, self._once(call)))
                if len(tries) >= self._repeats or sum(tries) > LIMIT_S:
                    return median(tries)

    def _once(self, call: Callable[[], Any]) -> float:
        self._settle()
        began = time.perf_counter()
        call()
        self._settle()
        return time.perf_counter() - began

    def _settle(self) -> None:
        if self._decoder.device.type != "cpu":
            torch.get_device_module(self._decoder.device).synchronize()

    @staticmethod
    def _slowest(communicator: Communicator, seconds: float) -> float:
        own = torch.tensor([seconds], dtype=torch.float64)
        return communicator.all_gather(own, sizes=[1] * communicator.world_size, site=SITE).max().item()


def _hidden(decoder, rows: int) -> torch.Tensor:
    """[rows, C] of the size that normed rows have, the same on every rank."""
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, decoder.config.hidden_size, generator=generator)
    return values.to(device=decoder.device, dtype=decoder.dtype)


def _context(decoder, count: int, past: int) -> tuple:
    """(rotary, step, cache) of one sequence's `count` new tokens after `past` ones."""
    cache = decoder.new_cache(count + past, 1)
    sequence = cache.add_sequence()
    if past:
        cache.step([sequence], [past])
        for pages in (*cache.k, *cache.v):
            pages.zero_()                            # what was never computed must at least be finite
    step = cache.step([sequence], [count])
    return decoder.rotary(step.positions, decoder.dtype), step, cache


def _sum(communicator: Communicator, block: Block, hidden: torch.Tensor) -> None:
    summand = communicator.empty(hidden.shape, hidden.dtype).copy_(hidden)
    residual = hidden[communicator.rows(hidden.shape[0])].clone()
    norm = block.norm
    communicator.all_reduce_rms_norm(summand, residual, norm.weight, norm.eps, site=block.site, weight_offset=norm.weight_offset,
                                     post_weight=norm.post_weight)
