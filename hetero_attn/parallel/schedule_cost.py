"""What a step's tasks cost: a layer's pieces and its sums at a few numbers of rows, measured, and what lies between.

Numbers are the slowest rank's, the same on all. A piece's time is taken to run straight between the points; attention adds a cost for every
query and key that see each other, so that a late part of a long sequence is known to be dearer than an early one.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hetero_attn.parallel.schedule_order import EMBED, INNER, PRODUCT, SUM, Cut, Task, Timeline, leaves, simulate

ATTENTION, MLP = "attention", "mlp"
KINDS = (ATTENTION, MLP)                             # of a layer's blocks, in order
PIECES = tuple(f"{kind}_{piece}" for kind in KINDS for piece in (INNER, PRODUCT))
CODED_SUM = "coded_sum"                              # a sum by the lossy codec that the link would gain by
LEAST_SLOPE = 0.5
SIMULATED_LAYERS = 4                                 # the pattern repeats: more layers tell no more


class Curve:
    """Seconds against rows: straight between measured points and on beyond the last two, no less than the first below it.

    Beyond them a row costs at least LEAST_SLOPE of what it costs at the last: a product that still waits for its weights there hardly
    rises, and will; so will one of two points that was disturbed.
    """

    def __init__(self, points: Iterable[tuple[int, float]]) -> None:
        self.points = sorted(points)
        self._rows = [rows for rows, _ in self.points]
        if not self.points:
            raise ValueError("a curve needs a measured point, got none")

    def __call__(self, rows: int) -> float:
        at = bisect_left(self._rows, rows)
        if at == 0:
            return self.points[0][1]
        left, low = self.points[at - 1]
        if at == len(self.points):
            before, lower = self.points[at - 2] if at > 1 else (0, 0.0)
            return low + max((low - lower) / (left - before), LEAST_SLOPE * low / left) * (rows - left)
        right, high = self.points[at]
        return low + (high - low) * (rows - left) / (right - left)


@dataclass(frozen=True, eq=False)
class Costs:
    """pieces: name of PIECES, SUM or CODED_SUM -> its Curve. pair_s: seconds of attention for a query and a key that it sees.
    efficiency: the part of a simulated gain over plain that the clock has seen; what lacks to 1 is processor time that both lanes want.
    further_s: seconds of the compute lane that an operation beside it takes, however few rows it moves (threads that wake, messages).
    windows: (window, share of the layers that have it) of a model with windowed attention; () = every layer sees all keys."""

    pieces: Mapping[str, Curve]
    pair_s: float = 0.0
    efficiency: float = 1.0
    further_s: float = 0.0
    windows: tuple[tuple[int | None, float], ...] = ()

    def of(self, cut: Cut, counts: Sequence[int], lengths: Sequence[int], layers: int = SIMULATED_LAYERS, *, coded: bool = False
           ) -> Callable[[Task], float]:
        """How long each task of a cut takes, for simulate() of that many layers."""
        pairs = {rows: self.pairs(rows, counts, lengths) for rows in (*cut.parts, *cut.entering[0])}

        def seconds(task: Task) -> float:
            if task.kind == EMBED:                   # an all-reduce moves as much as a sum with its norm
                return self.pieces[SUM](len(cut.entering[task.part][task.tile]))
            leaving, kind = leaves(task.block, task.part, 2 * layers, cut), KINDS[task.block % 2]
            if task.kind == INNER:
                rows = cut.entering[task.part][task.tile] if task.block == 0 else cut.parts[task.part]
                own = self.pieces[f"{kind}_{INNER}"](cut.exit[task.tile] if leaving else len(rows))
                return own + (self.pair_s * pairs[rows] if kind == ATTENTION else 0.0)
            tile = cut.exit[task.tile] if leaving else len(cut.tiles[task.part][task.tile])
            # A tile's product by itself; of a part that is one tile the curve has it as it is.
            return self.pieces[f"{kind}_{PRODUCT}" if task.kind == PRODUCT else CODED_SUM if coded else SUM](tile)

        return seconds

    def pairs(self, rows: range, counts: Sequence[int], lengths: Sequence[int]) -> float:
        """seen_pairs() of a layer, on average: one layer's time stands for all, and a weave's parts drift by the sum of them."""
        if not self.windows:
            return seen_pairs(rows, counts, lengths)
        return sum(share * seen_pairs(rows, counts, lengths, window) for window, share in self.windows)

    def simulated(self, cut: Cut, counts: Sequence[int], lengths: Sequence[int], layers: int = SIMULATED_LAYERS, *, coded: bool = False
                  ) -> Timeline:
        """The step by this cut, on the cost model's clock."""
        return simulate(2 * layers, cut, self.of(cut, counts, lengths, layers, coded=coded))

    def seconds(self, cut: Cut, counts: Sequence[int], lengths: Sequence[int], layers: int = SIMULATED_LAYERS, *, coded: bool = False
                ) -> float:
        """What to expect of the cut: the simulation, with only `efficiency` of what it gains over plain (measured on halves), and further_s
        for every operation of the communication lane beyond those of halves."""
        step = tuple(counts), tuple(lengths), layers, coded
        plain = _simulated_s(self, Cut.at(cut.total), *step)
        gain = plain - _simulated_s(self, cut, *step)
        further = max(operations(cut, layers) - operations(HALVES, layers), 0)
        return plain - (self.efficiency * gain if gain > 0 else gain) + self.further_s * further

    def settings(self) -> list[str]:
        """As the profile's overlap.measured holds them: 'what rows milliseconds'."""
        return [f"{name} {rows} {seconds * 1e3:.4g}" for name, curve in self.pieces.items() for rows, seconds in curve.points]


@functools.lru_cache(maxsize=64)                      # of one step: plain is asked for with every cut, a cut again with its ends tapered
def _simulated_s(costs: Costs, cut: Cut, counts: tuple[int, ...], lengths: tuple[int, ...], layers: int, coded: bool) -> float:
    return costs.simulated(cut, counts, lengths, layers, coded=coded).seconds


HALVES = Cut.at(2, [1])


def operations(cut: Cut, layers: int) -> int:
    """How many the communication lane does in a step by this cut."""
    return sum(map(len, cut.entering)) + 2 * layers * sum(map(len, cut.tiles)) + max(len(cut.exit) - 1, 0)


def from_settings(measured: Iterable[str], pair_ns: float | None, efficiency: float | None = None, further_ms: float | None = None
                  ) -> Costs | None:
    """The costs that settings() wrote; None where a piece is missing. Raises ValueError for a name that is none."""
    points: dict[str, list[tuple[int, float]]] = {}
    for text in measured:
        name, rows, milliseconds = text.split()
        if name not in (*PIECES, SUM, CODED_SUM):
            raise ValueError(f"overlap.measured has {name!r}, expected one of {', '.join((*PIECES, SUM, CODED_SUM))}")
        points.setdefault(name, []).append((int(rows), float(milliseconds) * 1e-3))
    if any(name not in points for name in (*PIECES, SUM)):
        return None
    return Costs({name: Curve(own) for name, own in points.items()}, (pair_ns or 0.0) * 1e-9,
                 1.0 if efficiency is None else efficiency, (further_ms or 0.0) * 1e-3)


def seen_pairs(rows: range, counts: Sequence[int], lengths: Sequence[int], window: int | None = None) -> int:
    """How many (query, key) pairs causal attention looks at for these rows of a step of counts[i] new tokens and lengths[i] keys each.

    window: the newest keys that a query sees, itself included; None = all.
    """
    total, begin = 0, 0
    for count, length in zip(counts, lengths):
        first, last = max(begin, rows.start), min(begin + count, rows.stop)
        if first < last:
            low = length - count + first - begin + 1                        # keys that the first row sees
            whole = last - first if window is None else min(max(window - low + 1, 0), last - first)      # rows that see all before them
            total += whole * (2 * low + whole - 1) // 2 + (last - first - whole) * (window or 0)
        begin += count
    return total
