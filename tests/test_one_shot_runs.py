"""one_shot's long payloads travel in runs: cut where a codec loses nothing, the same bits as in one piece, and a refusal reaches every rank
from whichever run it was in."""

from __future__ import annotations

import pytest
import torch

from hetero_attn.collectives.choice import Fixed, Route
from hetero_attn.collectives.codec import Codecs
from hetero_attn.collectives.codec.calibration import Calibration, SiteRanges
from hetero_attn.collectives.coding import Plain, sum_in_rank_order
from hetero_attn.collectives.direct import RUNS_MOST, runs_of
from hetero_attn.collectives.wire import AHEAD_BYTES
from hetero_attn.testing.ranks import on_ranks

WIDTH, ROWS = 1000, 700                              # 700,000 values: 11 runs of AHEAD_BYTES in fp32, so RUNS_MOST; 2 in 4 bits


def calibrated(world_size: int) -> Calibration:
    highest = torch.linspace(2.8, 3.2, WIDTH)        # three deviations of summand()
    each, total = highest.repeat(world_size, 1), 2.0 * highest
    return Calibration(world_size, {"s": SiteRanges.symmetric(-each, each, -total, total)})


def codings():
    codecs = Codecs(0, 2)
    codecs.calibration = calibrated(2)
    return [Plain(torch.float32), *(codecs.coding(name, "s", WIDTH, torch.float32) for name in ("int4_group32", "int4_outliers"))]


def summand(rank: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(rank))


def test_a_payload_is_cut_into_runs_of_its_grain():
    assert runs_of(Plain(torch.float32), 100) == [100]
    assert runs_of(Plain(torch.float32), AHEAD_BYTES // 2) == [AHEAD_BYTES // 4] * 2
    for coding in codings():
        for count in (1, 31, 100_003, 5_000_001):
            runs = runs_of(coding, count)
            assert sum(runs) == count and min(runs) > 0 and len(runs) <= RUNS_MOST
            assert all(run % coding.grain == 0 for run in runs[:-1])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_runs_hold_the_values_of_the_whole(place):
    coding, x = codings()[place], summand(0).flatten()
    whole, begins = coding.decode(coding.encode(x, 0), 0, 0, x.numel()), [0]
    runs = runs_of(coding, x.numel())
    assert len(runs) > 1
    parts = []
    for run in runs:
        part = x[begins[-1] : begins[-1] + run]
        parts.append(coding.decode(coding.encode(part, begins[-1]), 0, begins[-1], run).clone())
        begins.append(begins[-1] + run)
    assert torch.equal(torch.cat(parts), whole)


def in_ranks(communicator):
    """{route: result}, and the texts of what was refused, with NaN in early and late runs of different ranks."""
    communicator.codecs.calibration = calibrated(communicator.world_size)
    found, refused = {}, []
    for codec in ("none", "int4_group32", "int4_outliers"):
        communicator.choice = Fixed(Route("one_shot", codec))
        found[codec] = communicator.all_reduce(summand(communicator.rank), site="s")
        if codec == "none":
            continue
        for bad in ({1: -1}, {2: 0, 1: -1}, {0: 350 * WIDTH}):
            x = summand(communicator.rank)
            if communicator.rank in bad:
                x.view(-1)[bad[communicator.rank]] = torch.nan
            try:
                communicator.all_reduce(x, site="s")
            except ValueError as error:
                refused.append(str(error))
    handle = communicator.start("all_reduce", summand(communicator.rank), site="s")
    return {name: each.view(torch.int32) for name, each in found.items()}, refused, handle.wait().view(torch.int32)


@pytest.mark.ranks
def test_sums_in_runs_on_every_rank():
    outcomes = on_ranks(in_ranks, (), 3)
    assert not any(outcome.error for outcome in outcomes), outcomes
    sums, refused, started = outcomes[0].result
    exact = sum_in_rank_order([summand(rank) for rank in range(3)], torch.float32)
    assert torch.equal(sums["none"].view(torch.float32), exact)
    for name in ("int4_group32", "int4_outliers"):
        assert (sums[name].view(torch.float32) - exact).square().mean().sqrt() < 0.4
    assert len(refused) == 6 and [text.split(" values")[0] for text in refused] == ["rank 1's", "rank 1's", "rank 0's"] * 2
    for outcome in outcomes[1:]:
        assert all(torch.equal(outcome.result[0][name], sums[name]) for name in sums), "the same bits"
        assert outcome.result[1] == refused and torch.equal(outcome.result[2], started)
    assert torch.equal(started, sums["int4_outliers"])
