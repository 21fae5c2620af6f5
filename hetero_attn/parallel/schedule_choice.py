"""Which cut a step gets: the profile's `schedule` as an object, asked once a step with what every rank knows of it, the lengths.

Ranks must come to the same cut, so a schedule is made of numbers that all of them share (agreed when the model is loaded) and decides
without looking at anything else. None means that the step is too short for the residual to be sharded: layer after layer, fewest messages.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hetero_attn.parallel.schedule_cost import ATTENTION, CODED_SUM, MLP, SIMULATED_LAYERS, Costs
from hetero_attn.parallel.schedule_cut import Product, ProductTiles, shrinking, split_rows, split_tiles
from hetero_attn.parallel.schedule_order import INNER, PRODUCT, SUM, Cut, simulate
from hetero_attn.profile_overlap import MOST_PARTS

TILES = (2, 3, 4, 6, 8, 12)                          # numbers of tiles that are considered
ENOUGH = 0.05                                        # the fewest tiles that come so near the best: each costs a little that no model knows
WORTH = 0.03                                         # a cut is taken if it is expected to save so much: the model is no better than that
REMEMBERED = 512


class Schedule:
    """The base, and the choice for a world of one: nothing is ever cut."""

    name = "whole"

    def cut(self, counts: Sequence[int], lengths: Sequence[int]) -> Cut | None:
        """The cut of a step of counts[i] new tokens of sequences that have lengths[i] keys then; None = residual on every rank, no cut."""
        return None


class Given(Schedule):
    """The same places for every step, whatever they are good for: for tests and measurements.

    boundaries: rows where parts begin; tiles: rows where parts are cut further. Those beyond a step's end are left out. pieces: (rows of a
    part) -> those that enter, or backwards leave, at a time, () = all at once; not asked where there is one part or the last has tiles.
    """

    name = "given"

    def __init__(self, boundaries: Sequence[int] = (), tiles: Sequence[int] = (), pieces: Callable[[int], Sequence[int]] = lambda rows: ()
                 ) -> None:
        self.boundaries, self.tiles, self.pieces = sorted(set(boundaries)), sorted(set(tiles) - set(boundaries)), pieces

    def cut(self, counts: Sequence[int], lengths: Sequence[int]) -> Cut | None:
        total = sum(counts)
        ends = [0, *(row for row in self.boundaries if 0 < row < total), total]
        inside = [[row for row in self.tiles if begin < row < end] for begin, end in pairwise(ends)]
        cut = Cut.at(total, ends[1:-1], inside)
        if len(cut.parts) < 2 or len(cut.tiles[-1]) > 1:
            return cut
        entry, leaving = (tuple(self.pieces(len(cut.parts[at]))) for at in (0, -1))
        return Cut(cut.tiles, entry, leaving[::-1])


@dataclass(frozen=True)
class Places:
    """What the planner knows: thresholds in tokens, the alignment and the product's tiles, a layer's products, and the ranks."""

    shard_tokens: int
    min_tokens: int
    alignment: int = 1
    tiles: ProductTiles | None = None
    products: tuple[Product, ...] = ()
    ranks: int = 1

    def weave(self, total: int, parts: int) -> Cut:
        """`parts` parts, or fewer where there are not enough rows."""
        return _woven(self, total, parts)

    def tapered(self, cut: Cut, counts: Sequence[int], lengths: Sequence[int], costs: Costs) -> Cut:
        """A weave whose first part enters, and whose last part leaves, in pieces, where the costs say that it gains by that."""
        if len(cut.tiles) < 2 or len(cut.tiles[0]) > 1 or len(cut.tiles[-1]) > 1:
            return cut
        def pieces(part: range, kind: str, *computed: str, alignment: int) -> tuple[int, ...]:
            rows = len(part)
            spent = sum(costs.pieces[f"{kind}_{piece}"](rows) for piece in computed)
            return shrinking(rows, costs.pieces[SUM](rows) / spent, alignment=alignment) if spent > 0 else ()

        entry = pieces(cut.parts[0], ATTENTION, INNER, alignment=self.alignment)[::-1]
        leaving = pieces(cut.parts[-1], MLP, INNER, PRODUCT, alignment=math.lcm(self.alignment, self.ranks))
        found = [cut, Cut(cut.tiles, entry), Cut(cut.tiles, entry, leaving)]
        return min(found, key=lambda each: costs.seconds(each, counts, lengths))

    def tiled(self, total: int, tiles: int, costs: Costs | None = None) -> Cut:
        """One part of `tiles` tiles, long and short by the MLP's product and sum; equal ones where their costs are unknown."""
        product_s, sum_s = (costs.pieces[f"{MLP}_{PRODUCT}"](total), costs.pieces[SUM](total)) if costs else (1.0, 1.0)
        return Cut.at(total, (), [split_tiles(total, tiles, product_s, sum_s, alignment=self.alignment)])


@functools.lru_cache(maxsize=REMEMBERED)             # a tile_shape makes the search long, and steps of a chunked prompt are alike
def _woven(places: Places, total: int, parts: int) -> Cut:
    return Cut.at(total, split_rows(total, parts, alignment=places.alignment, products=places.products, tiles=places.tiles))


class Plain(Schedule):
    """One sum after the other, the residual sharded by rows from places.shard_tokens on."""

    name = "plain"

    def __init__(self, places: Places) -> None:
        self.places = places

    def cut(self, counts: Sequence[int], lengths: Sequence[int]) -> Cut | None:
        total = sum(counts)
        return Cut.at(total) if total >= self.places.shard_tokens else None


class Weave(Plain):
    """In parts from places.min_tokens on; `parts` of them, or what the costs like best. Without costs two."""

    name = "weave"

    def __init__(self, places: Places, parts: int | None = None, costs: Costs | None = None) -> None:
        super().__init__(places)
        self.parts, self.costs = parts, costs

    def cut(self, counts: Sequence[int], lengths: Sequence[int]) -> Cut | None:
        total = sum(counts)
        if total < self.places.min_tokens:
            return super().cut(counts, lengths)
        numbers = [self.parts or 2] if self.parts or not self.costs else range(2, MOST_PARTS + 1)
        cuts = [self.places.weave(total, parts) for parts in numbers]
        if self.costs:
            cuts = [self.places.tapered(cut, counts, lengths, self.costs) for cut in cuts]
        return _least(cuts, counts, lengths, self.costs)


class Tiled(Plain):
    """Every row-parallel product in tiles from places.min_tokens on; `tiles` of them, or what the costs like best. Without costs four."""

    name = "tiled"

    def __init__(self, places: Places, tiles: int | None = None, costs: Costs | None = None) -> None:
        super().__init__(places)
        self.tiles, self.costs = tiles, costs

    def cut(self, counts: Sequence[int], lengths: Sequence[int]) -> Cut | None:
        total = sum(counts)
        if total < self.places.min_tokens:
            return super().cut(counts, lengths)
        if self.tiles or not self.costs:
            return self.places.tiled(total, self.tiles or 4, self.costs)
        return _fewest([self.places.tiled(total, tiles, self.costs) for tiles in TILES],
                       lambda cut: self.costs.seconds(cut, counts, lengths))


class Auto(Plain):
    """What costs least by the costs: plain, a weave or tiles, exact sums or coded ones where there is such a choice.

    parts, tiles: fixed numbers, None = any. use_codec: called at every step with whether this step's sums are to be coded, and never where
    the costs lack CODED_SUM; a coded sum is lossy and is taken only if it saves WORTH of the step.
    """

    name = "auto"

    def __init__(self, places: Places, costs: Costs, parts: int | None = None, tiles: int | None = None,
                 use_codec: Callable[[bool], None] | None = None) -> None:
        super().__init__(places)
        self.costs, self.parts, self.tiles, self.use_codec = costs, parts, tiles, use_codec if CODED_SUM in costs.pieces else None
        self._chosen: dict[tuple, tuple[Cut | None, bool]] = {}
        self._spare_s: dict[int, float] = {}

    def cut(self, counts: Sequence[int], lengths: Sequence[int]) -> Cut | None:
        if sum(counts) < self.places.min_tokens:     # every step of decoding, and no two have the same lengths: nothing to remember
            if self.use_codec is not None:
                self.use_codec(self._short_coded(counts, lengths))
            return super().cut(counts, lengths)
        key = alike(counts, lengths)
        if key not in self._chosen:
            if len(self._chosen) >= REMEMBERED:
                self._chosen.clear()
            self._chosen[key] = self.choose(counts, lengths)
        cut, coded = self._chosen[key]
        if self.use_codec is not None:
            self.use_codec(coded)
        return cut

    def choose(self, counts: Sequence[int], lengths: Sequence[int]) -> tuple[Cut | None, bool]:
        """(cut, whether sums are coded) of a step. A plainer choice stands unless another saves WORTH of it."""
        total, plain = sum(counts), super().cut(counts, lengths)
        if total < self.places.min_tokens:
            return plain, self.use_codec is not None and self._short_coded(counts, lengths)
        choices = [(plain or Cut.at(total), False)]
        choices += [(self.places.tapered(self.places.weave(total, parts), counts, lengths, self.costs), False)
                    for parts in ([self.parts] if self.parts else range(2, MOST_PARTS + 1))]
        choices.append((Tiled(self.places, self.tiles, self.costs).cut(counts, lengths), False))
        if self.use_codec is not None:
            choices += [(cut, True) for cut, _ in choices]
        seconds = [self.costs.seconds(cut, counts, lengths, coded=coded) for cut, coded in choices]
        best = 0
        for coded in (False, True):
            own = [place for place, choice in enumerate(choices) if choice[1] == coded]
            nearest = min(own, key=seconds.__getitem__, default=best)
            if seconds[nearest] < (1 - WORTH) * seconds[best]:
                best = nearest
        cut, coded = choices[best]
        return (plain, coded) if cut == choices[0][0] else (cut, coded)

    def _short_coded(self, counts: Sequence[int], lengths: Sequence[int]) -> bool:
        """Whether the sums of a step that is not cut are coded. Of as many tokens only the pairs tell two steps apart, and whatever time
        they take makes what a codec saves a smaller part of the step: so it is worked out once how much time that may be."""
        total = sum(counts)
        if total not in self._spare_s:
            exact, coded = (self.costs.seconds(Cut.at(total), [], [], coded=coded) for coded in (False, True))
            if len(self._spare_s) >= REMEMBERED:
                self._spare_s.clear()
            self._spare_s[total] = ((1 - WORTH) * exact - coded) / WORTH
        pairs = self.costs.pairs(range(total), counts, lengths)
        return SIMULATED_LAYERS * self.costs.pair_s * pairs < self._spare_s[total]


def alike(counts: Sequence[int], lengths: Sequence[int]) -> tuple:
    """What a step shares with those that may be cut as it was: the rows, and about as many keys. Beside a long prompt others decode, and
    their lengths are new at every step: they count together."""
    decoding = sum(length for count, length in zip(counts, lengths) if count == 1)
    return tuple(counts), tuple(_about(length) for count, length in zip(counts, lengths) if count > 1), _about(decoding)


def _about(number: int) -> int:
    """Its first five bits: at most a sixteenth less."""
    shift = max(number.bit_length() - 5, 0)
    return number >> shift << shift


def linear_tiles(total: int, product_s: Callable[[int], float], sum_s: Callable[[int], float], *, alignment: int = 1) -> Cut:
    """The tiles of one row-parallel linear of `total` rows and its sum, for tiled_linear(). product_s, sum_s: seconds of so many rows."""
    def seconds(cut: Cut) -> float:
        of = {PRODUCT: product_s, SUM: sum_s}
        return simulate(1, cut, lambda task: of[task.kind](len(cut.tiles[0][task.tile])) if task.kind in of else 0.0).seconds

    whole = product_s(total), sum_s(total)
    return _fewest([Cut.at(total, (), [split_tiles(total, tiles, *whole, alignment=alignment)]) for tiles in (1, *TILES)], seconds)


def _fewest(cuts: Sequence[Cut], seconds: Callable[[Cut], float]) -> Cut:
    """The first of several, finer and finer, that comes within ENOUGH of the best."""
    times = [seconds(cut) for cut in cuts]
    return next(cut for cut, took in zip(cuts, times) if took <= (1 + ENOUGH) * min(times))


def _least(cuts: Sequence[Cut], counts: Sequence[int], lengths: Sequence[int], costs: Costs | None) -> Cut:
    """Of several the one that costs least; the first where there are no costs to tell."""
    if costs is None or len(cuts) == 1:
        return cuts[0]
    return min(cuts, key=lambda cut: costs.seconds(cut, counts, lengths))
