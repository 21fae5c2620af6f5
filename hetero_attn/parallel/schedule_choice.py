"""Which cut a step gets: the profile's `schedule` as an object, asked once a step with what every rank knows of it, the lengths.

Ranks must come to the same cut, so a schedule is made of numbers that all of them share (agreed when the model is loaded) and decides
without looking at anything else. None means that the step is too short for the residual to be sharded: layer after layer, fewest messages.
"""

from __future__ import annotations

from collections.abc import Sequence

from hetero_attn.parallel.schedule_order import Cut


class Schedule:
    """The base, and the choice for a world of one: nothing is ever cut."""

    name = "whole"

    def cut(self, counts: Sequence[int], lengths: Sequence[int]) -> Cut | None:
        """The cut of a step of counts[i] new tokens of sequences that have lengths[i] keys then; None = residual on every rank, no cut."""
        return None


class Given(Schedule):
    """The same places for every step, whatever they are good for: for tests and measurements.

    boundaries: rows where parts begin; tiles: rows where parts are cut further. Those beyond a step's end are left out.
    """

    name = "given"

    def __init__(self, boundaries: Sequence[int] = (), tiles: Sequence[int] = ()) -> None:
        self.boundaries, self.tiles = sorted(set(boundaries)), sorted(set(tiles) - set(boundaries))

    def cut(self, counts: Sequence[int], lengths: Sequence[int]) -> Cut | None:
        total = sum(counts)
        ends = [0, *(row for row in self.boundaries if 0 < row < total), total]
        inside = [[row for row in self.tiles if begin < row < end] for begin, end in zip(ends, ends[1:])]
        return Cut.at(total, ends[1:-1], inside)
