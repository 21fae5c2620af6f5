"""Where steps are cut: the wave formula, long and short tiles, the cost model, and what each schedule chooses of it."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_attn.communicator import shard_counts, shard_rows
from hetero_attn.parallel.schedule_choice import Auto, Given, Places, Plain, Schedule, Tiled, Weave
from hetero_attn.parallel.schedule_cost import CODED_SUM, PIECES, SUM, Costs, Curve, from_settings, seen_pairs
from hetero_attn.parallel.schedule_cut import Product, ProductTiles, dealt, shrinking, split_rows, split_tiles
from hetero_attn.parallel.schedule_order import Cut, simulate

PLACES = Places(shard_tokens=16, min_tokens=256, alignment=8)


def costs(compute=1e-3, communication=1e-3, fixed=0.0, coded=None, **more):
    """Every piece a quarter of `compute` seconds a row, sums `communication` a row; `fixed` a call."""
    pieces = {name: Curve([(1, fixed + compute / 4), (4096, fixed + compute * 1024)]) for name in PIECES}
    pieces[SUM] = Curve([(1, fixed + communication), (4096, fixed + communication * 4096)])
    if coded:
        pieces[CODED_SUM] = Curve([(1, fixed + coded), (4096, fixed + coded * 4096)])
    return Costs(pieces, **more)


def test_waves():
    tiles = ProductTiles(128, 256, 132)
    assert tiles.waves(128, 256) == 1 and tiles.waves(4096, 8192) == 8               # 32 x 32 tiles over 132 units
    assert tiles.waves(4096 + 1, 8192) == 8 and tiles.waves(8192, 8192) == 16


@given(st.integers(1, 20000), st.integers(1, 4), st.sampled_from([1, 8, 128]))
@settings(max_examples=200, deadline=None)
def test_parts_are_aligned_ordered_and_near_even(total, parts, alignment):
    boundaries = split_rows(total, parts, alignment=alignment)
    assert all(row % alignment == 0 for row in boundaries) and boundaries == sorted(set(boundaries))
    assert len(boundaries) == max(1, min(parts, total // alignment)) - 1
    Cut.at(total, boundaries)
    sizes = [end - begin for begin, end in itertools.pairwise([0, *boundaries, total])]
    assert max(sizes) - min(sizes) <= 2 * alignment


@given(st.integers(2, 64), st.lists(st.integers(1, 40).map(lambda n: 256 * n), min_size=1, max_size=4), st.integers(1, 140))
@settings(max_examples=60, deadline=None)
def test_two_parts_have_the_fewest_waves_that_any_boundary_in_reach_has(blocks, widths, units):
    total, tiles = 128 * blocks, ProductTiles(128, 256, units)
    (found,) = split_rows(total, 2, alignment=128, products=[Product(width) for width in widths], tiles=tiles) or [0]

    def waves(row):
        return sum(tiles.waves(row, width) + tiles.waves(total - row, width) for width in widths)

    middle = round(total / 2 / 128)
    tried = [128 * step for step in range(middle - 8, middle + 9) if 0 < 128 * step < total]
    assert waves(found) == min(map(waves, tried))


def test_a_cut_moves_where_even_halves_would_add_a_wave():
    """9 row tiles over 4 units with one column tile: 5 + 4 rows of tiles run in 3 waves, 8 + 1 too, but 4.5 each cannot be."""
    tiles = ProductTiles(128, 256, 4)
    (found,) = split_rows(128 * 10, 2, alignment=128, products=[Product(256)], tiles=tiles)
    assert found in (128 * 4, 128 * 6) and tiles.waves(found, 256) + tiles.waves(1280 - found, 256) == tiles.waves(1280, 256) == 3
    assert split_rows(128 * 10, 2, alignment=128) == [128 * 5]                        # without the formula: even, and 4 waves


@given(st.integers(1, 5000), st.integers(1, 12), st.floats(0.01, 10), st.floats(0.01, 10), st.sampled_from([1, 8]))
@settings(max_examples=200, deadline=None)
def test_tiles_show_at_most_one_of_so_many(total, tiles, product_s, sum_s, alignment):
    boundaries = split_tiles(total, tiles, product_s, sum_s, alignment=alignment)
    cut = Cut.at(total, (), [boundaries])
    sizes = [len(tile) for tile in cut.tiles[0]]
    assert len(sizes) <= max(1, min(tiles, total // alignment))
    if len(sizes) > 1:                                       # the short one where little of it shows
        short = sizes[0] if sum_s > product_s else sizes[-1]
        assert short == min(sizes) and len({*sizes[1:-1], sizes[-1] if sum_s > product_s else sizes[0]}) == 1
    if alignment == 1 and len(sizes) == tiles and total >= 50 * tiles:
        rate = {"product": product_s / total, "sum": sum_s / total}
        found = simulate(1, cut, lambda task: rate.get(task.kind, 0.0) * len(cut.tiles[0][task.tile]))
        assert found.seconds - max(product_s, sum_s) <= min(product_s, sum_s) * (1 / tiles + 0.05)


@given(st.integers(1, 5000), st.floats(0.01, 10), st.sampled_from([1, 2, 8, 24, 128]))
@settings(max_examples=200, deadline=None)
def test_pieces_shrink_and_are_all_of_the_rows(rows, ratio, alignment):
    sizes = shrinking(rows, ratio, alignment=alignment)
    assert not sizes or (sum(sizes) == rows and 2 <= len(sizes) <= 3 and min(sizes) >= 16)
    assert list(sizes) == sorted(sizes, reverse=True) and not any(size % alignment for size in sizes[1:])
    assert bool(sizes) or rows < 5 * max(16, 2 * alignment)


@given(st.integers(1, 5), st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 30), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_pieces_are_dealt_so_that_each_rank_has_its_own_rows(ranks, whole, odd, random):
    sizes = [size * ranks for size in whole] + ([odd] if odd else [])
    random.shuffle(sizes)
    owned = [list(range(sum(sizes)))[shard_rows(sum(sizes), rank, ranks)] for rank in range(ranks)]
    found = dealt(sizes, lambda rows: shard_counts(ranks, rows))
    for rank in range(ranks):
        assert [row for slices in found for row in range(sum(sizes))[slices[rank]]] == owned[rank]
    assert [sum(own.stop - own.start for own in slices) for slices in found] == sizes


def test_pieces_that_leave_a_rank_with_another_s_rows_are_refused():
    with pytest.raises(ValueError, match="multiples of 3"):
        dealt([4, 4, 4], lambda rows: shard_counts(3, rows))


def test_a_weave_is_tapered_where_that_pays():
    """Sums a quarter as long as what is computed: the ends stand alone for less, and nothing else changes."""
    model = costs(1e-3, 0.25e-3)
    cut = Weave(PLACES, 2, model).cut([512], [512])
    assert [len(part) for part in cut.parts] == [256, 256]
    assert cut.entry == tuple(sorted(cut.entry)) and cut.exit == tuple(sorted(cut.exit, reverse=True)) and cut.entry and cut.exit
    assert model.seconds(cut, [512], [512]) < model.seconds(Cut(cut.tiles), [512], [512]) - 0.25e-3 * 256
    assert str(Weave(PLACES, 2, costs(1e-3, 0.25e-3, fixed=0.1)).cut([512], [512])) == "256 | 256"
    assert all(rows % 3 == 0 for rows in Weave(dataclasses.replace(PLACES, ranks=3), 2, model).cut([600], [600]).exit[1:])


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=5), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_pairs_are_counted(sequences, draw):
    counts, lengths = [count for count, _ in sequences], [count + past for count, past in sequences]
    seen = [length - count + row + 1 for count, length in zip(counts, lengths) for row in range(count)]
    begin, end = sorted(draw.randint(0, len(seen)) for _ in range(2))
    assert seen_pairs(range(begin, end), counts, lengths) == sum(seen[begin:end])


def test_costs_go_through_the_profile_and_back():
    found = costs(2e-3, 3e-3, coded=1e-3, pair_s=5e-9, efficiency=0.8)
    again = from_settings(found.settings(), 5.0, 0.8, 2.5)
    assert again.settings() == found.settings()
    assert (again.pair_s, again.efficiency, again.further_s) == (pytest.approx(5e-9), 0.8, 2.5e-3)
    assert from_settings(found.settings()[2:], 5.0) is None                           # a piece is missing
    with pytest.raises(ValueError, match="'product'"):
        from_settings(["product 3 1.5"], None)


def test_a_curve_between_and_beyond_its_points():
    curve = Curve([(100, 2.0), (10, 1.0)])
    assert [curve(rows) for rows in (1, 10, 55, 100, 200)] == [1.0, 1.0, 1.5, 2.0, pytest.approx(2.0 + 100 / 90)]
    beyond = [[(10, 1.0)], [(5, 1.0), (10, 1.0)], [(5, 2.0), (10, 1.0)], [(5, 0.4), (10, 1.0)]]
    assert [Curve(points)(20) for points in beyond] == [2.0, 1.5, 1.5, pytest.approx(2.2)]     # at least half of what a row costs there


def test_what_each_schedule_cuts():
    assert Schedule().cut([5000], [5000]) is None
    assert Plain(PLACES).cut([15], [15]) is None and str(Plain(PLACES).cut([10, 10], [10, 90])) == "20"
    assert str(Weave(PLACES).cut([512], [512])) == "256 | 256" and str(Weave(PLACES).cut([255], [255])) == "255"
    assert str(Weave(PLACES, parts=3).cut([300, 300], [300, 300])) == "200 | 200 | 200"
    assert str(Tiled(PLACES).cut([512], [512])) == "128+128+128+128" and Tiled(PLACES).cut([3], [3]) is None
    assert str(Given([4, 90], [2]).cut([10], [10])) == "2+2 | 6"


def test_auto_takes_what_pays_and_stays_plain_where_nothing_does():
    assert Auto(PLACES, costs()).cut([1024], [1024]).overlaps
    assert not Auto(PLACES, costs(fixed=10.0)).cut([1024], [1024]).overlaps            # a split costs more than it hides
    assert not Auto(PLACES, costs(efficiency=0.0)).cut([1024], [1024]).overlaps        # the lanes want the same processor
    assert not Auto(PLACES, costs(communication=1e-6)).cut([1024], [1024]).overlaps
    assert not Auto(PLACES, costs()).cut([255], [255]).overlaps                        # below the threshold
    assert Auto(PLACES, costs()).cut([3], [3]) is None
    assert len(Auto(PLACES, costs(), parts=4).cut([1024], [1024]).parts) == 4
    assert len(Auto(PLACES, costs(further_s=0.05)).cut([1024], [1024]).parts) == 2     # a sum more a part is dear, however short
    assert len(Auto(PLACES, costs(), parts=4, tiles=2).cut([1024], [1024]).parts) in (1, 4)


@given(st.floats(1e-6, 1e-2), st.floats(1e-6, 1e-2), st.floats(0, 1), st.floats(0, 1), st.integers(256, 4096))
@settings(max_examples=40, deadline=None)
def test_auto_is_by_its_costs_no_slower_than_any_fixed_choice(compute, communication, fixed, efficiency, total):
    model = costs(compute, communication, fixed, efficiency=efficiency)
    auto = model.seconds(Auto(PLACES, model).cut([total], [total]), [total], [total])
    fixed = (Plain(PLACES), Weave(PLACES, costs=model), Weave(PLACES, 2), Weave(PLACES, 4), Tiled(PLACES, costs=model), Tiled(PLACES, 8))
    for other in fixed:
        assert auto <= 1.031 * model.seconds(other.cut([total], [total]), [total], [total])


def test_auto_codes_sums_only_where_that_saves_the_step_something():
    said = []
    cheap = Auto(PLACES, costs(1e-3, 0.2e-3, coded=0.1e-3), use_codec=said.append)     # exact sums hide in any case
    cheap.cut([2048], [2048])
    dear = Auto(PLACES, costs(1e-3, 9e-3, coded=1e-3), use_codec=said.append)
    dear.cut([2048], [2048])
    dear.cut([2048], [2048])
    assert said == [False, True, True]
