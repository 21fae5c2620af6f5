"""Timing a loaded model's pieces and sums, and whole steps by given cuts: what the cost model is made of, and what it is checked by.

All ranks measure together and the slowest counts. One layer stands for all: of each piece, the median of a few calls at a few numbers of
rows, with nothing else going on. The calls of one piece lie a whole pass over all of them apart, so that a disturbed second spoils one call
of many pieces instead of many of one; what still spreads is measured longer. Steps run a few layers, contenders in turns.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from hetero_attn.collectives.link import slowest
from hetero_attn.communicator import Communicator
from hetero_attn.models.config import ModelConfig
from hetero_attn.parallel.schedule import Block
from hetero_attn.parallel.schedule_cost import CODED_SUM, KINDS, Costs, Curve, operations, seen_pairs
from hetero_attn.parallel.schedule_order import INNER, PRODUCT, SUM, Cut
from hetero_attn.profile_overlap import MOST_PARTS

QUICK_ROWS = (32, 128, 256)
THOROUGH_ROWS = (16, 32, 64, 128, 256, 512, 1024)
REPEATS, FEWEST, LIMIT_S = 5, 3, 0.5                 # calls of a piece, and of one that has taken so many seconds in all
SPREAD = 0.15                                        # of a piece's calls, the middle half against the median: above, REPEATS more
EFFICIENCY_ROWS, EFFICIENCY_ROUNDS = 256, 5          # a cut this short, or the longest measured, shows how much of a gain is real
DOUBTFUL = 0.5                                       # less than that is measured twice before it is believed
LIKENESS = 1.25                                      # a row of many may cost so much more than one of fewer, or both are measured again
LOAD_S = 5.0                                         # for QUICK_ROWS, when a model is loaded: its user waits
PATIENCE_S = 2.0                                     # no piece is tried at more rows once it takes so long
SITE = "tune"
FAR = "attention farther"                            # a piece: attention's inner one with as many keys more for every row


def measure_costs(
    decoder, rows: Sequence[int] = THOROUGH_ROWS, *, use_codec: Callable[[bool], None] | None = None, repeats: int = REPEATS,
    budget_s: float = math.inf,
) -> Costs:
    """The costs of `decoder`'s blocks and sums at these numbers of rows. use_codec: as Auto has it; with it coded sums are timed too.

    budget_s: for all that is timed, seconds. With it only as many rows and calls are tried as fit, at least one call of each piece at the
    fewest rows and one round of steps.
    """
    points = _Points(decoder, use_codec, budget_s)
    for count in sorted({min(each, decoder.config.context_length // 2 or 1) for each in rows}):
        if not points.room_for(count):
            break
        if points.add(count) > PATIENCE_S:
            break
    points.settle(repeats)
    if use_codec is not None:
        use_codec(False)
    costs = replace(points.costs(), windows=windows_of(decoder.config))
    efficiency, further_s = _beside(decoder, costs, sorted({min(each, EFFICIENCY_ROWS) for _, each in points.calls}),
                                    budget_s - points.spent_s)
    return replace(costs, efficiency=efficiency, further_s=further_s)


class _Points:
    """A layer's pieces and sums at growing numbers of rows, each with the seconds of its calls so far; all ranks hold the same."""

    def __init__(self, decoder, use_codec: Callable[[bool], None] | None, budget_s: float = math.inf) -> None:
        self.decoder, self.use_codec, self.timed, self.budget_s = decoder, use_codec, _Timer(decoder), budget_s
        layer = layer_to_measure(decoder.config)
        self.window, self.blocks = decoder.config.windows[layer], decoder.layers[layer].blocks(decoder.norm)
        self.spent_s = 0.0                           # on the clock that all ranks share
        self.calls: dict[tuple[str, int], Callable[[], Any]] = {}
        self.tries: dict[tuple[str, int], list[float]] = {}

    @property
    def most_rows(self) -> int:
        return max(count for _, count in self.calls)

    def room_for(self, count: int) -> bool:
        """Whether half the budget lets these rows be tried, and all pieces once more: by the rows before, in proportion. The other half is
        for repeats and for steps."""
        if not self.calls:
            return True
        once = sum(own[-1] for (_, rows), own in self.tries.items() if rows == self.most_rows) * count / self.most_rows
        return self.spent_s + 3 * once <= self.budget_s / 2

    def add(self, count: int) -> float:
        """The pieces for `count` rows of a new sequence, each called once after a call that does not count -> the longest one's seconds."""
        made = self._made(count)
        for name, call in made.items():
            self.calls[name, count], self.tries[name, count] = call, []
            self._call(name, count, warm=True)
        return max(own[-1] for (_, rows), own in self.tries.items() if rows == count)

    def _made(self, count: int) -> dict[str, Callable[[], Any]]:
        """The calls for `count` rows, with operands of their own."""
        hidden = _hidden(self.decoder, count)
        near, far = _context(self.decoder, count, 0), _context(self.decoder, count, self._past(count))
        made: dict[str, Callable[[], Any]] = {FAR: partial(self.blocks[0].inner, hidden, far)}
        for kind, block in zip(KINDS, self.blocks):
            made[f"{kind}_{INNER}"] = partial(block.inner, hidden, near)
            with torch.no_grad(), self.decoder.choosing():
                made[f"{kind}_{PRODUCT}"] = partial(block.product, block.inner(hidden, near))
        made[SUM] = partial(_sum, self.decoder.communicator, self.blocks[0], hidden)
        if self.use_codec is not None:
            made[CODED_SUM] = made[SUM]
        return made

    def settle(self, repeats: int) -> None:
        """Pass after pass over all of them until each has its calls; then again those that spread or do not fit their neighbours."""
        self._passes(list(self.calls), repeats)
        self._passes(self._spread(), 2 * repeats)
        # Anew, and elsewhere in memory: whatever disturbed them lasted through all their calls, and operands whose addresses are alike
        # modulo a page make a product up to twice as slow. One that becomes quicker may show that a longer one is not right either.
        renewed: set[tuple[str, int]] = set()
        while unlike := [point for point in self._unlike() if point not in renewed]:
            made = {count: self._made(count) for count in dict.fromkeys(count for _, count in unlike)}
            for name, count in unlike:
                self.calls[name, count], self.tries[name, count] = made[count][name], []
            self._passes(unlike, repeats)
            renewed.update(unlike)

    def costs(self) -> Costs:
        found: dict[str, list[tuple[int, float]]] = {}
        for (name, count), tries in self.tries.items():
            found.setdefault(name, []).append((count, median(tries)))
        near, far = found[f"{KINDS[0]}_{INNER}"], found.pop(FAR)
        most = near[-1][0]                                                              # by the most rows: there it is largest
        further = self._pairs(most, self._past(most)) - self._pairs(most, 0)            # 0 where the window is all they see
        pair_s = max((far[-1][1] - near[-1][1]) / further, 0.0) if further else 0.0
        # the pairs of these very measurements are counted apart
        found[f"{KINDS[0]}_{INNER}"] = [(count, max(seconds - pair_s * self._pairs(count, 0), 0.0)) for count, seconds in near]
        return Costs({name: Curve(own) for name, own in found.items()}, pair_s)

    def _past(self, count: int) -> int:
        return min(count, self.decoder.config.context_length - count)

    def _pairs(self, count: int, past: int) -> int:
        return seen_pairs(range(count), [count], [count + past], self.window)

    def _passes(self, points: Sequence[tuple[str, int]], calls: int) -> None:
        for _ in range(calls):
            if self.spent_s > self.budget_s / 2:
                return
            for name, count in points:
                tries = self.tries[name, count]
                if len(tries) < calls and (len(tries) < FEWEST or sum(tries) < LIMIT_S * calls / REPEATS):
                    self._call(name, count)

    def _spread(self) -> list[tuple[str, int]]:
        return [point for point, tries in self.tries.items() if middle_half(tries) > SPREAD]

    def _unlike(self) -> list[tuple[str, int]]:
        """Points where a row costs much more than where rows are fewer, and those fewer: a product does not, so one of the two is wrong."""
        found: list[tuple[str, int]] = []
        with_pairs = (FAR, f"{KINDS[0]}_{INNER}")       # a row of many does cost more there
        for name in dict.fromkeys(name for name, _ in self.tries if name not in with_pairs):
            own = sorted(count for other, count in self.tries if other == name)
            for fewer, more in pairwise(own):
                each = [median(self.tries[name, count]) / count for count in (fewer, more)]
                if each[1] > LIKENESS * each[0]:
                    found += [(name, fewer), (name, more)]
        return list(dict.fromkeys(found))

    def _call(self, name: str, count: int, warm: bool = False) -> None:
        if self.use_codec is not None:
            self.use_codec(name == CODED_SUM)
        seconds = self.timed(self.calls[name, count], warm=warm)
        self.spent_s += (1 + warm) * seconds
        self.tries[name, count].append(seconds)


def windows_of(config: ModelConfig) -> tuple[tuple[int | None, float], ...]:
    """As Costs has them: () where no layer's attention has a window."""
    if not any(config.windows):
        return ()
    return tuple((window, number / len(config.windows)) for window, number in Counter(config.windows).items())


def layer_to_measure(config: ModelConfig) -> int:
    """The layer that stands for all: the middle one, or of a model with windows the nearest to it that sees most."""
    widest = max(config.windows, key=lambda window: math.inf if window is None else window)
    middle = len(config.windows) // 2
    return min((layer for layer, window in enumerate(config.windows) if window == widest), key=lambda layer: abs(layer - middle))


def middle_half(tries: Sequence[float]) -> float:
    """How far the middle half of some times lies apart, over their median."""
    own = sorted(tries)
    return (own[(3 * len(own)) // 4] - own[len(own) // 4]) / median(own)


def _beside(decoder, costs: Costs, rows: Sequence[int], left_s: float = math.inf) -> tuple[float, float]:
    """What the simulation does not know of the lanes: (efficiency, further_s) of Costs, from real steps of the most of `rows` for which
    left_s lasts.

    efficiency: how much of the gain that the costs promise two parts is there on the clock, 0 to 1; 1 where they promise none. further_s:
    what four parts take more than two, beyond what the simulation says of both, a further operation.
    """
    layers = min(2, len(decoder.layers))
    once = [6 * costs.simulated(Cut.at(each), [each], [each], layers).seconds for each in rows]        # three cuts, each called before
    count = max((each for each, seconds in zip(rows, once) if seconds <= left_s), default=rows[0])
    if count < MOST_PARTS:
        return 1.0, 0.0
    places = [part * count // MOST_PARTS for part in range(1, MOST_PARTS)]
    cuts = {"plain": Cut.at(count), "halves": Cut.at(count, [count // 2]), "more": Cut.at(count, places)}
    promised = {name: costs.simulated(cut, [count], [count], layers).seconds for name, cut in cuts.items()}
    gain, times = promised["plain"] - promised["halves"], {name: [] for name in cuts}
    round_s = sum(promised.values())
    for _ in range(2):                               # a doubtful one on the clock again: a schedule that is given up loses much more
        rounds = max(int(min(left_s / max(round_s, 1e-9), EFFICIENCY_ROUNDS + 1)) - 1, 0 if times["plain"] else 1)
        if not rounds:
            break
        for name, own in time_cuts(decoder, cuts, rounds, layers=layers).items():
            times[name] += own
            left_s -= sum(own) * (rounds + 1) / rounds
        found = {name: median(own) for name, own in times.items()}
        if gain <= 0 or found["plain"] - found["halves"] >= DOUBTFUL * gain:
            break
    efficiency = min(max((found["plain"] - found["halves"]) / gain, 0.0), 1.0) if gain > 0 else 1.0
    further = operations(cuts["more"], layers) - operations(cuts["halves"], layers)
    unknown = {name: found[name] - promised[name] for name in cuts}
    return efficiency, max(unknown["more"] - unknown["halves"], 0.0) / further


def measure_whole_sum(decoder, rows: Sequence[int]) -> dict[int, float]:
    """rows -> seconds of a sum with the residual whole on every rank: all-reduce, add, norm."""
    communicator, norm = decoder.communicator, decoder.norm

    def call(hidden: torch.Tensor) -> None:
        norm(hidden + communicator.all_reduce(communicator.empty(hidden.shape, hidden.dtype).copy_(hidden), site=SITE))

    return _medians(decoder, {count: partial(call, _hidden(decoder, count)) for count in rows})


def measure_coded_sum(decoder, use_codec: Callable[[bool], None], rows: Sequence[int] = QUICK_ROWS) -> Curve:
    """CODED_SUM by itself, for costs that were measured without it."""
    block = decoder.layers[layer_to_measure(decoder.config)].blocks(decoder.norm)[0]
    use_codec(True)
    try:
        found = _medians(decoder, {count: partial(_sum, decoder.communicator, block, _hidden(decoder, count)) for count in rows})
    finally:
        use_codec(False)
    return Curve(found.items())


def _medians(decoder, calls: Mapping[int, Callable[[], Any]]) -> dict[int, float]:
    """Seconds of some calls that take turns."""
    timed = _Timer(decoder)
    tries = [{count: timed(own, warm=not number) for count, own in calls.items()} for number in range(REPEATS)]
    return {count: median(each[count] for each in tries) for count in calls}


def time_cuts(decoder, cuts: Mapping[str, Cut], rounds: int, *, layers: int | None = None) -> dict[str, list[float]]:
    """Seconds of the embedding and the first `layers` layers (None: all) by each of some cuts of one prompt's T rows: name -> one number
    a round.

    Contenders take turns, every other round backwards, after a round that does not count.
    """
    names, timed = list(cuts), _Timer(decoder)
    rotary, step, cache = _context(decoder, cuts[names[0]].total, 0)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names if number % 2 else reversed(names):
            seconds = timed(partial(decoder.run_cut, rotary, step, cache, cuts[name], layers))
            if number:
                found[name].append(seconds)
    return found


class _Timer:
    """The slowest rank's seconds of a call, the same number on every rank."""

    def __init__(self, decoder) -> None:
        self._decoder = decoder

    @torch.no_grad()
    def __call__(self, call: Callable[[], Any], *, warm: bool = False) -> float:
        """warm: after a call that does not count."""
        communicator = self._decoder.communicator
        with self._decoder.choosing():
            if warm:
                call()
            communicator.barrier(site=SITE)
            return slowest(communicator, self._once(call), site=SITE)

    def _once(self, call: Callable[[], Any]) -> float:
        self._settle()
        began = time.perf_counter()
        call()
        self._settle()
        return time.perf_counter() - began

    def _settle(self) -> None:
        if self._decoder.device.type != "cpu":
            torch.get_device_module(self._decoder.device).synchronize()


def _hidden(decoder, rows: int) -> torch.Tensor:
    """[rows, C] of the size that normed rows have, the same on every rank."""
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, decoder.config.hidden_size, generator=generator)
    return values.to(device=decoder.device, dtype=decoder.dtype)


def _context(decoder, count: int, past: int) -> tuple:
    """(rotary, step, cache) of one sequence's `count` new tokens after `past` ones. All layers share one layer's pages."""
    cache = decoder.new_cache(count + past, 1, layers=1)
    cache.k, cache.v = cache.k * decoder.config.layers, cache.v * decoder.config.layers
    sequence = cache.add_sequence()
    if past:
        cache.step([sequence], [past])
        for pages in (cache.k[0], cache.v[0]):
            pages.zero_()                            # what was never computed must at least be finite
    tokens = torch.randint(decoder.config.vocab_size, (count,), generator=torch.Generator().manual_seed(count)).to(decoder.device)
    step = cache.step([sequence], [count], tokens)
    return decoder.rotary(step.positions, decoder.dtype), step, cache


def _sum(communicator: Communicator, block: Block, hidden: torch.Tensor) -> None:
    summand = communicator.empty(hidden.shape, hidden.dtype).copy_(hidden)
    residual = hidden[communicator.rows(hidden.shape[0])].clone()
    communicator.all_reduce_rms_norm(summand, residual, **block.norm.options(block.site))
