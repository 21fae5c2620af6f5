"""The order of a step's work as data, and what the clock will make of it: pure Python, no tensor and no rank.

Work stands in two lanes. The compute lane takes its tasks one after the other; so does the communication lane. A task begins when its lane
is free and what it needs is done, and waits for nothing else: no phases, no barrier between the lanes. The executor (schedule.py) runs the
very list that is simulated here, so what simulate() says of a cut is what the cut reaches where every task takes as long as it is told:
it knows no waiting but the order's own. It is as good as those times, and no bound: the clock beats it where they are too long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

COMPUTE, COMMUNICATION = "compute", "communication"
EMBED, INNER, PRODUCT, SUM = "embed", "inner", "product", "sum"


@dataclass(frozen=True)
class Cut:
    """How the T rows of a step are divided.

    tiles  for each part, in row order, the ranges of rows that travel together. A part is what goes through a block at once; its tiles
           are multiplied by the row-parallel weight, and summed over the ranks, one by one
    entry  () or how many rows of the first part enter at a time: their embedded rows travel, and go through the first attention, piece
           by piece, so that computing begins after a short piece
    exit   () or how many rows of the last part leave at a time: they go through the last block, an MLP, and are summed piece by piece, so
           that only a short sum is left at the end. A piece has its share of every rank's rows

    One part of one tile is the plain schedule; several parts are TokenWeave's split; one part of several tiles is FastAttention's
    tiling-AllReduce. Raises ValueError unless the tiles are non-empty and cover 0 to T in order, and entry and exit are of cuts in several
    parts and have their part's rows.
    """

    tiles: tuple[tuple[range, ...], ...]
    entry: tuple[int, ...] = ()
    exit: tuple[int, ...] = ()

    def __post_init__(self):
        end = 0
        for tile in (tile for part in self.tiles for tile in part):
            if tile.start != end or tile.stop <= tile.start or tile.step != 1:
                raise ValueError(f"a cut's tiles are {self.tiles}, expected non-empty ranges that follow each other from 0 on")
            end = tile.stop
        if not self.tiles or not all(self.tiles):
            raise ValueError(f"a cut's tiles are {self.tiles}, expected at least one part and one tile in each")
        for name, pieces, rows in (("entry", self.entry, len(self.parts[0])), ("exit", self.exit, len(self.parts[-1]))):
            if pieces and (len(self.tiles) < 2 or min(pieces) < 1 or sum(pieces) != rows):
                raise ValueError(f"a cut's {name} is {pieces} and its parts {self.parts}, expected () or pieces of {rows} rows of one of "
                                 "several parts")
        if self.exit and len(self.tiles[-1]) > 1:
            raise ValueError(f"a cut's exit is {self.exit} and its last part has {len(self.tiles[-1])} tiles, expected () or one tile")

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

    @cached_property
    def parts(self) -> tuple[range, ...]:
        """The rows of each part."""
        return tuple(range(part[0].start, part[-1].stop) for part in self.tiles)

    @cached_property
    def entering(self) -> tuple[tuple[range, ...], ...]:
        """The rows of each part as they enter."""
        first, *others = self.parts
        return _ranges(list(accumulate(self.entry or (len(first),), initial=0))), *((part,) for part in others)

    @property
    def overlaps(self) -> bool:
        """Whether anything can be computed while something travels."""
        return len(self.tiles) > 1 or len(self.tiles[0]) > 1

    def __str__(self) -> str:
        parts = ["+".join(str(len(tile)) for tile in part) for part in self.tiles]
        for place, word, pieces in ((0, "in", self.entry), (-1, "out", self.exit)):
            if pieces:
                parts[place] += f" ({word} {'+'.join(map(str, pieces))})"
        return " | ".join(parts)


def _ranges(ends: Sequence[int]) -> tuple[range, ...]:
    return tuple(range(begin, end) for begin, end in pairwise(ends))


class Task(NamedTuple):
    """One piece of work. kind: EMBED (a part's embedded rows from the ranks that hold them), INNER (a block up to its row-parallel weight,
    for a whole part), PRODUCT (with that weight, for a tile) or SUM (over the ranks, with the norm that follows, for a tile). EMBED and
    SUM are the communication lane's. tile counts the pieces of a part that enters or leaves in some; else it is 0 for EMBED and INNER.
    block is 0 for EMBED."""

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
    for part, pieces in enumerate(cut.entering):
        for piece in range(len(pieces)):
            yield Task(EMBED, 0, part, piece)
    for block in range(blocks):
        for part, tiles in enumerate(cut.tiles):
            if leaves(block, part, blocks, cut):
                for piece in range(len(cut.exit)):
                    yield from (Task(kind, block, part, piece) for kind in (INNER, PRODUCT, SUM))
                continue
            for piece in range(len(cut.entering[part]) if block == 0 else 1):
                yield Task(INNER, block, part, piece)
            for tile in range(len(tiles)):
                yield Task(PRODUCT, block, part, tile)
                yield Task(SUM, block, part, tile)


def leaves(block: int, part: int, blocks: int, cut: Cut) -> bool:
    """Whether a part goes through this block in the pieces of the cut's exit."""
    return bool(cut.exit) and 0 < block == blocks - 1 and part == len(cut.tiles) - 1


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
