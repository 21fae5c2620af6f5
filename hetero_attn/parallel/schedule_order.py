"""The order of a step's work as data, and what the clock will make of it: pure Python, no tensor and no rank.

Work stands in two lanes. The compute lane takes its tasks one after the other; so does the communication lane. A task begins when its lane
is free and what it needs is done, and waits for nothing else: no phases, no barrier between the lanes. The executor (schedule.py) runs the
very list that is simulated here, so what simulate() says of a cut is what the cut can reach at best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

COMPUTE, COMMUNICATION = "compute", "communication"
EMBED, INNER, PRODUCT, SUM = "embed", "inner", "product", "sum"


@dataclass(frozen=True)
class Cut:
    """How the T rows of a step are divided.

    tiles  for each part, in row order, the ranges of rows that travel together. A part is what goes through a block at once; its tiles
           are multiplied by the row-parallel weight, and summed over the ranks, one by one

    One part of one tile is the plain schedule; several parts are TokenWeave's split; one part of several tiles is FastAttention's
    tiling-AllReduce. Raises ValueError unless the tiles are non-empty and cover 0 to T in order.
    """

    tiles: tuple[tuple[range, ...], ...]

    def __post_init__(self):
        end = 0
        for tile in (tile for part in self.tiles for tile in part):
            if tile.start != end or tile.stop <= tile.start or tile.step != 1:
                raise ValueError(f"a cut's tiles are {self.tiles}, expected non-empty ranges that follow each other from 0 on")
            end = tile.stop
        if not self.tiles or not all(self.tiles):
            raise ValueError(f"a cut's tiles are {self.tiles}, expected at least one part and one tile in each")

    @classmethod
    def at(cls, total: int, boundaries: Sequence[int] = (), tiles: Sequence[Sequence[int]] = ()) -> Cut:
        """Parts that begin at 0 and at `boundaries` of `total` rows. tiles: for each part, rows where it is cut further (in the step's
        own numbering); () = nowhere."""
        ends = [0, *boundaries, total]
        inside = tiles or [()] * (len(ends) - 1)
        return cls(tuple(_ranges([begin, *cuts, end]) for begin, end, cuts in zip(ends[:-1], ends[1:], inside, strict=True)))

    @property
    def total(self) -> int:
        """T, the rows of the step."""
        return self.tiles[-1][-1].stop

    @property
    def parts(self) -> tuple[range, ...]:
        """The rows of each part."""
        return tuple(range(part[0].start, part[-1].stop) for part in self.tiles)

    @property
    def overlaps(self) -> bool:
        """Whether anything can be computed while something travels."""
        return len(self.tiles) > 1 or len(self.tiles[0]) > 1

    def __str__(self) -> str:
        return " | ".join("+".join(str(len(tile)) for tile in part) for part in self.tiles)


def _ranges(ends: Sequence[int]) -> tuple[range, ...]:
    return tuple(range(begin, end) for begin, end in pairwise(ends))


class Task(NamedTuple):
    """One piece of work. kind: EMBED (a part's embedded rows from the ranks that hold them), INNER (a block up to its row-parallel weight,
    for a whole part), PRODUCT (with that weight, for a tile) or SUM (over the ranks, with the norm that follows, for a tile). EMBED and
    SUM are the communication lane's. tile is 0 for EMBED and INNER, block for EMBED."""

    kind: str
    block: int
    part: int
    tile: int

    @property
    def lane(self) -> str:
        return COMMUNICATION if self.kind in (EMBED, SUM) else COMPUTE


def order(blocks: int, cut: Cut) -> Iterator[Task]:
    """Every task of `blocks` blocks (an attention or an MLP each), in the order in which each lane takes its own.

    Part after part within a block. That the keys of a sequence's first part are there when its second part attends follows from it.
    """
    for part in range(len(cut.tiles)):
        yield Task(EMBED, 0, part, 0)
    for block in range(blocks):
        for part, tiles in enumerate(cut.tiles):
            yield Task(INNER, block, part, 0)
            for tile in range(len(tiles)):
                yield Task(PRODUCT, block, part, tile)
                yield Task(SUM, block, part, tile)


def needs(task: Task, cut: Cut) -> list[Task]:
    """What must be done before a task may begin, beyond the tasks before it in its own lane."""
    if task.kind == SUM:
        return [task._replace(kind=PRODUCT)]
    if task.kind in (EMBED, PRODUCT):
        return []
    if task.block == 0:
        return [task._replace(kind=EMBED)]
    return [Task(SUM, task.block - 1, task.part, tile) for tile in range(len(cut.tiles[task.part]))]


class Span(NamedTuple):
    """A task and its time, seconds from the step's beginning."""

    task: Task
    begin: float
    end: float


class Timeline(NamedTuple):
    """What simulate() found. seconds: until the last task's end; compute, communication: what each lane works in that time."""

    spans: tuple[Span, ...]
    seconds: float
    compute: float
    communication: float

    @property
    def hidden(self) -> float:
        """The part of the shorter lane's work that lies under the other's: 1 = all of it."""
        least = min(self.compute, self.communication)
        return (self.compute + self.communication - self.seconds) / least if least else 1.0


def simulate(blocks: int, cut: Cut, seconds: Callable[[Task], float]) -> Timeline:
    """Run the order against the clock of `seconds`, which says how long each task takes."""
    free = {COMPUTE: 0.0, COMMUNICATION: 0.0}
    busy = {COMPUTE: 0.0, COMMUNICATION: 0.0}
    done: dict[Task, float] = {}
    spans = []
    for task in order(blocks, cut):
        begin = max([free[task.lane], *(done[each] for each in needs(task, cut))])
        took = seconds(task)
        free[task.lane] = done[task] = begin + took
        busy[task.lane] += took
        spans.append(Span(task, begin, begin + took))
    return Timeline(tuple(spans), max(free.values()), busy[COMPUTE], busy[COMMUNICATION])
