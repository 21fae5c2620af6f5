"""Every schedule gives plain's logits: any split point, any tiles, batches of mixed lengths, every family, 1 to 4 ranks.

Each world size starts its ranks once and runs all families and cases in them.
"""

import itertools
import os
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_models import TOLERANCE, apart, family_decoder, random_batch, run_batch
from tiny_families import FAMILIES

from hetero_attn.communicator import SoloCommunicator
from hetero_attn.models import schedule_measure
from hetero_attn.models.schedule_setup import make_schedule
from hetero_attn.parallel.linear import RowParallelLinear
from hetero_attn.parallel.schedule_choice import Given, Schedule
from hetero_attn.parallel.schedule_cost import PIECES, Costs, Curve, operations
from hetero_attn.parallel.schedule_order import SUM, Cut
from hetero_attn.parallel.tiled_linear import tiled_linear
from hetero_attn.profile import load_profile
from hetero_attn.testing.ranks import on_ranks

FULL = bool(os.environ.get("HETERO_ATTN_FULL"))
CASES = 40 if FULL else 3
_decoders = {}


def pieces(rows, each):
    """So many rows at a time, what remains at the end; all at once where each is 0."""
    return (*[each] * (rows // each), *([rows % each] if rows % each else [])) if each else ()


def solo(name):
    if name not in _decoders:
        _decoders[name] = family_decoder(name, SoloCommunicator())
    return _decoders[name]


@given(st.sampled_from(sorted(FAMILIES)), st.randoms(use_true_random=False), st.sets(st.integers(1, 60), max_size=4),
       st.sets(st.integers(1, 60), max_size=4), st.integers(0, 20))
@settings(max_examples=400 if FULL else 40, deadline=None)
def test_any_cut_on_one_rank(name, draw, boundaries, tiles, piece):
    decoder, batch = solo(name), random_batch(draw)
    decoder.schedule = Schedule()
    expected = run_batch(decoder, *batch)
    decoder.schedule = Given(boundaries, tiles, lambda rows: pieces(rows, piece))
    assert apart(run_batch(decoder, *batch), expected) <= TOLERANCE


@pytest.mark.parametrize("disturbed", [
    lambda call, name, rows: 30 <= call < 55,                              # a second or two of something else
    lambda call, name, rows: (name, rows) == ("mlp_product", 32) and call < 90,      # all of one piece's calls, by bad luck
])
def test_a_disturbed_moment_does_not_reach_the_costs(disturbed):
    points, calls = schedule_measure._Points(solo("llama2"), None), itertools.count()

    def clock(call, warm=False):
        name, rows = next(key for key, own in points.calls.items() if own is call)
        return 1e-4 * rows * (3 if disturbed(next(calls), name, rows) else 1)

    points.timed = clock
    for rows in (8, 16, 32):
        points.add(rows)
    points.settle(5)
    assert next(calls) > 6 * 3 * 5                           # not fewer calls than asked for
    for curve in points.costs().pieces.values():
        assert [(rows, pytest.approx(seconds)) for rows, seconds in curve.points] == [(8, 8e-4), (16, 16e-4), (32, 32e-4)]


def test_operands_that_lie_badly_are_made_anew():
    """Addresses alike modulo a page can double a product's time for as long as its operands stay where they are."""
    points = schedule_measure._Points(solo("llama2"), None)
    slow = []

    def clock(call, warm=False):
        rows = next(rows for (_, rows), own in points.calls.items() if own is call)
        return 1e-4 * rows * (2 if any(call is each for each in slow) else 1)

    points.timed = clock
    for rows in (8, 16, 32):
        points.add(rows)
    slow += [points.calls["mlp_product", 16], points.calls["mlp_product", 32]]
    points.settle(3)
    assert [seconds for _, seconds in points.costs().pieces["mlp_product"].points] == [pytest.approx(rows * 1e-4) for rows in (8, 16, 32)]


def test_what_a_further_sum_costs_is_seen_on_the_clock(monkeypatch):
    pieces = {name: Curve([(1, 1e-3), (512, 512e-3)]) for name in (*PIECES, SUM)}
    costs, decoder = Costs(pieces), SimpleNamespace(layers=[None] * 4)

    def clock(decoder, cuts, rounds, *, layers):
        plain = costs.simulated(cuts["plain"], [256], [256], layers).seconds
        took = {name: plain - 0.8 * (plain - costs.simulated(cut, [256], [256], layers).seconds) for name, cut in cuts.items()}
        unknown = operations(cuts["more"], layers) - operations(cuts["halves"], layers)
        took["more"] = took["halves"] + costs.simulated(cuts["more"], [256], [256], layers).seconds
        took["more"] += unknown * 2e-3 - costs.simulated(cuts["halves"], [256], [256], layers).seconds
        return {name: [seconds] * rounds for name, seconds in took.items()}

    monkeypatch.setattr(schedule_measure, "time_cuts", clock)
    assert schedule_measure._beside(decoder, costs, [256]) == (pytest.approx(0.8), pytest.approx(2e-3))
    assert schedule_measure._beside(decoder, costs, [3]) == (1.0, 0.0)


def test_a_seeded_fault_is_caught(monkeypatch):
    """A second part that does not see its sequence's first keys must show."""
    from hetero_attn.models.cache import Step

    decoder = solo("llama3.1")
    decoder.schedule = Schedule()
    expected = run_batch(decoder, [0, 5], [19, 3])
    decoder.schedule = Given((9,))
    assert apart(run_batch(decoder, [0, 5], [19, 3]), expected) <= TOLERANCE
    whole = Step.part

    def forgetful(step, rows):
        part = whole(step, rows)
        shorter = torch.minimum(part.seqused_k, torch.diff(part.cu_seqlens_q))
        return type(part)(**{**vars(part), "seqused_k": shorter})

    monkeypatch.setattr(Step, "part", forgetful)
    assert apart(run_batch(decoder, [0, 5], [19, 3]), expected) > 100 * TOLERANCE


def all_families(communicator, seed: int) -> dict:
    """On each rank: every family through CASES random cuts of random batches, against plain of the same weights; the largest difference."""
    draw, report = random.Random(seed), {"agreed": agreed(communicator), "tiled": tiled(communicator)}
    for name in FAMILIES:
        decoder = family_decoder(name, communicator, vocabulary=draw.choice(("sharded", "sharded", "master")))
        worst, bits = 0.0, 0.0
        for _ in range(CASES):
            batch = random_batch(draw)
            boundaries = [draw.randint(1, 40) for _ in range(draw.randint(0, 3))]
            tiles = [draw.randint(1, 40) for _ in range(draw.randint(0, 3))]
            found = []
            piece = communicator.world_size * draw.randint(0, 4)
            tapered = Given(boundaries, (), lambda rows, piece=piece: pieces(rows, piece))
            for schedule in (Schedule(), Given(), Given(boundaries, tiles), tapered):
                decoder.schedule = schedule
                found.append(run_batch(decoder, *batch))
            if found[0][0] is not None:
                worst = max(worst, *(apart(each, found[0]) for each in found[1:]))
                bits += sum(each.double().sum().item() for each in found[2])
        report[name] = worst, bits if decoder.vocabulary == "sharded" else None
    return report


def tiled(communicator) -> float:
    """One row-parallel linear in tiles against itself whole."""
    generator = torch.Generator().manual_seed(communicator.rank)
    layer = RowParallelLinear(communicator, "o", 8 * communicator.world_size, 24, range(8), site="o", bias=True, dtype=torch.float32,
                              device="cpu")
    torch.nn.init.normal_(layer.weight, generator=generator)
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias, generator=generator)
    x = torch.randn(37, 8, generator=generator)
    whole = layer(x)
    with pytest.raises(ValueError, match="from 0 to 37"):
        tiled_linear(layer, x, [range(5), range(5, 36)])
    return max(apart([tiled_linear(layer, x, Cut.at(37, (), [rows]).tiles[0])], [whole]) for rows in ([], [5], [1, 20, 36]))


def agreed(communicator) -> str:
    """The cut that a schedule makes whose profile differs from rank to rank: rank 0's counts."""
    mine = ["schedule=weave", "overlap.parts=3"] if communicator.rank == 0 else ["schedule=tiled", "overlap.shard_tokens=99"]
    schedule = make_schedule(family_decoder("llama3.1", communicator), load_profile("cpu", sets=["overlap.min_tokens=8", *mine]))
    return f"{schedule.name} {schedule.cut([24], [24])}"


@pytest.mark.ranks
@pytest.mark.parametrize("world_size, communicator", [(2, "cpu"), (2, "distributed-one_shot"), (3, "distributed-ring"), (4, "cpu")])
def test_every_family_and_any_cut_on_ranks(world_size, communicator):
    outcomes = on_ranks(all_families, (world_size,), world_size, communicator=communicator, timeout_s=280)
    assert not any(outcome.error for outcome in outcomes), "\n".join(outcome.traceback for outcome in outcomes)
    reports = [outcome.result for outcome in outcomes]
    assert {report["agreed"] for report in reports} == {"weave 8 | 8 | 8"}
    assert max(report["tiled"] for report in reports) <= TOLERANCE
    for name in FAMILIES:
        assert [worst for worst, _ in (report[name] for report in reports) if worst > TOLERANCE] == [], name
        assert len({bits for _, bits in (report[name] for report in reports)}) == 1, f"{name}: ranks would sample different tokens"
