"""The order of work and its simulation: cuts are checked, the lanes wait for true dependencies and nothing else."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_attn.parallel.schedule_cut import shrinking
from hetero_attn.parallel.schedule_order import COMPUTE, EMBED, INNER, PRODUCT, SUM, Cut, Task, leaves, needs, order, simulate


@st.composite
def cuts(draw, most: int = 40):
    total = draw(st.integers(1, most))
    rows = st.lists(st.integers(1, max(total - 1, 1)), max_size=6, unique=True).map(sorted)
    boundaries = [row for row in draw(rows) if row < total]
    ends = [0, *boundaries, total]
    inside = [[row for row in draw(rows) if begin < row < end] for begin, end in pairwise(ends)]
    cut = Cut.at(total, boundaries, inside)
    if len(cut.tiles) < 2 or not draw(st.booleans()):
        return cut
    pieces = [len(cut.parts[at]) for at in (0, -1)]
    entry, leaving = [(draw(st.integers(1, rows - 1)),) if rows > 1 else (rows,) for rows in pieces]
    return Cut(cut.tiles, (*entry, pieces[0] - sum(entry)) if sum(entry) < pieces[0] else entry,
               () if len(cut.tiles[-1]) > 1 else (*leaving, pieces[1] - sum(leaving)) if sum(leaving) < pieces[1] else leaving)


@given(cuts())
@settings(max_examples=100, deadline=None)
def test_a_cut_covers_every_row_once(cut):
    rows = [row for part in cut.tiles for tile in part for row in tile]
    assert rows == list(range(cut.total))
    assert [row for part in cut.parts for row in part] == rows
    assert cut.overlaps == (sum(map(len, cut.tiles)) > 1)


@pytest.mark.parametrize("tiles", [(), ((),), ((range(1, 3),),), ((range(3),), (range(4, 6),)), ((range(2), range(2, 2)),)])
def test_what_is_no_cut_is_refused(tiles):
    with pytest.raises(ValueError, match="expected"):
        Cut(tiles)


@given(cuts(), st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_simulated_tasks_wait_for_what_they_need_and_for_nothing_else(cut, blocks, random):
    lengths = {}
    timeline = simulate(blocks, cut, lambda task: lengths.setdefault(task, random.uniform(0.1, 2)))
    spans = {span.task: span for span in timeline.spans}
    further = 2 * len(cut.entering[0]) - 2 + (3 * len(cut.exit) - 3 if cut.exit and blocks > 1 else 0)
    assert len(spans) == len(cut.tiles) + blocks * sum(1 + 2 * len(part) for part in cut.tiles) + further
    assert list(spans) == list(order(blocks, cut))
    before = {}
    for span in timeline.spans:
        wanted = [spans[each].end for each in needs(span.task, cut)] + [before.get(span.task.lane, 0.0)]
        assert span.begin == max(wanted)                 # as early as lane and needs allow
        before[span.task.lane] = span.end
    assert timeline.seconds == max(span.end for span in timeline.spans)
    assert max(timeline.compute, timeline.communication) <= timeline.seconds * (1 + 1e-9)
    assert timeline.seconds <= (timeline.compute + timeline.communication) * (1 + 1e-9)


def test_the_needs_of_every_kind():
    cut = Cut.at(10, [4], [[2], [7]])
    assert needs(Task(SUM, 3, 1, 0), cut) == [Task(PRODUCT, 3, 1, 0)]
    assert needs(Task(INNER, 3, 1, 0), cut) == [Task(SUM, 2, 1, 0), Task(SUM, 2, 1, 1)]
    assert needs(Task(INNER, 0, 1, 0), cut) == [Task(EMBED, 0, 1, 0)]
    assert needs(Task(EMBED, 0, 1, 0), cut) == [] and needs(Task(PRODUCT, 3, 1, 1), cut) == []


def hidden(timeline):
    """The part of the shorter lane's work that lies under the other's."""
    return (timeline.compute + timeline.communication - timeline.seconds) / min(timeline.compute, timeline.communication)


def test_plain_hides_nothing_and_two_equal_parts_hide_all_but_the_ends():
    def second(task):
        return 0.0 if task.kind in (EMBED, INNER) else len(cut.tiles[task.part][task.tile]) / 8

    cut = Cut.at(8)
    plain = simulate(16, cut, second)
    assert plain.seconds == 32 and hidden(plain) == 0
    cut = Cut.at(8, [4])
    weave = simulate(16, cut, second)
    assert weave.compute == weave.communication == 16
    assert weave.seconds == 16.5                         # the first half's product and the last half's sum stand alone
    assert sum(span.end - span.begin for span in weave.spans if span.task.lane == COMPUTE) == 16


def test_pieces_at_the_ends_leave_less_standing_alone():
    def seconds(task):
        leaving = leaves(task.block, task.part, 16, cut)
        pieces = cut.entering[task.part][task.tile] if task.block == 0 and task.kind in (EMBED, INNER) else cut.tiles[task.part][0]
        rows = cut.exit[task.tile] if leaving else len(pieces)
        return rows * {EMBED: 0.5, INNER: 1.0, PRODUCT: 0.0, SUM: 0.5}[task.kind]

    cut = Cut.at(512, [256])
    assert simulate(16, cut, seconds).seconds == 16 * 512 + 128 + 128         # the first part's journey, and the last part's
    short = shrinking(256, 0.5, alignment=8)
    cut = Cut(cut.tiles, short[::-1], short)
    assert str(cut) == "256 (in 32+72+152) | 256 (out 152+72+32)"
    assert 16 * 512 + 32 <= simulate(16, cut, seconds).seconds < 16 * 512 + 64


@pytest.mark.parametrize("entry, leaving", [((3, 2), ()), ((), (3, 2)), ((4, 0), ()), ((5, -1), ())])
def test_pieces_that_are_not_their_part_are_refused(entry, leaving):
    with pytest.raises(ValueError, match="expected"):
        Cut(Cut.at(8, [4]).tiles, entry, leaving)
    with pytest.raises(ValueError, match="expected"):
        Cut(Cut.at(8).tiles, (4, 4))
    with pytest.raises(ValueError, match="2 tiles"):
        Cut(Cut.at(8, [4], [[], [6]]).tiles, (), (2, 2))


def test_more_parts_lift_what_two_leave_idle():
    """Half an attention is shorter than half a transfer: with two parts the MLP waits, with three it need not."""
    def seconds(task):
        share = len(cut.parts[task.part] if task.kind == INNER else cut.tiles[task.part][task.tile]) / 12
        return share * {EMBED: 0.0, INNER: (0.6, 1.4)[task.block % 2], PRODUCT: 0.0, SUM: 0.9}[task.kind]

    found = []
    for boundaries in ((), (6,), (4, 8), (3, 6, 9)):
        cut = Cut.at(12, boundaries)
        found.append(hidden(simulate(16, cut, seconds)))
    assert found[0] < 1e-9 and found[1] < 0.85 < found[2] < found[3]
