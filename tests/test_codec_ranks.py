"""The low-bit codecs between real ranks: the same bits everywhere, as few on the wire as promised, refusals that all hear.

One rank packs by torch on the host and the others natively, or on the device, if they can: nobody may be able to tell. On an accelerator:
HETERO_ATTN_TEST_DEVICE=cuda pytest tests/test_codec_ranks.py
"""

import hashlib
import math
import os

import pytest
import torch

from hetero_attn.collectives.choice import Fixed, Route
from hetero_attn.collectives.codec import NAMES, NonFiniteError
from hetero_attn.collectives.codec.calibration import Calibration, SiteRanges
from hetero_attn.collectives.codec.definition import TorchKernels
from hetero_attn.collectives.codec.lossy import GroupCoding
from hetero_attn.collectives.codec.measure import MovingRange
from hetero_attn.collectives.codec.traffic import Traffic
from hetero_attn.testing.ranks import DEVICE_VARIABLE, on_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TORCH = TorchKernels()
WORLD, WIDTH = 3, 130
SHAPES = ((5, WIDTH), (1, WIDTH), (40, WIDTH), (2, 3, WIDTH), (0, WIDTH), (7, WIDTH), (3, WIDTH))     # shapes change from call to call


def partial(rank: int, shape, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + math.prod(shape))
    x = torch.randn(shape, generator=generator)
    if x.numel():
        x[..., 17] *= 50                                                # an outlier feature
    return x.to(dtype)


def calibration(row_factors: bool) -> Calibration:
    moving = [MovingRange() for _ in range(WORLD + 1)]
    for shape in SHAPES[:3]:
        parts = [partial(rank, shape) for rank in range(WORLD)]
        for each, batch in zip(moving, [*parts, sum(parts)]):
            each.update(batch)
    lowest, highest = (torch.stack([getattr(each, part) for each in moving[:WORLD]]) for part in ("lowest", "highest"))
    ranges = SiteRanges.symmetric(lowest, highest, moving[WORLD].lowest, moving[WORLD].highest)
    return Calibration(WORLD, {"layers.0.o_proj": ranges}, row_factors=row_factors)


def mixed_kernels(communicator):
    """Rank 1 has no compiler: it packs by torch on the host, and must not be told apart."""
    from hetero_attn.collectives import codec

    if communicator.rank == 1:
        codec.kernels = lambda device: TORCH
        communicator.codecs.paths[communicator.device] = None


def in_rank(communicator, codec: str) -> dict:
    """Everything of one codec on a rank; plain values back."""
    mixed_kernels(communicator)
    device = communicator.device
    codec, _, plain = codec.partition(" ")
    if codec == "int4_outliers":
        communicator.codecs.calibration = calibration(row_factors=not plain)
    site, report = "layers.0.o_proj", {}
    for algorithm in ("one_shot", "two_shot", "star"):
        communicator.choice = Fixed(Route(algorithm, codec))
        for dtype in DTYPES:
            for shape in SHAPES:
                parts = [partial(rank, shape, dtype) for rank in range(WORLD)]
                exact = torch.stack([part.float() for part in parts]).sum(0)
                before = communicator.bytes_sent
                y = communicator.start_all_reduce(parts[communicator.rank].to(device, copy=True), site=site).wait().cpu()
                sent = communicator.bytes_sent - before
                error = ((y.float() - exact).norm() / sum(part.float().norm() for part in parts).clamp(min=1e-9)).item()
                report[algorithm, str(dtype), shape] = error, sent, hashlib.sha256(y.float().numpy().tobytes()).hexdigest()
        own = communicator.reduce_scatter(partial(communicator.rank, (7, WIDTH)).to(device), site=site).cpu()
        exact = torch.stack([partial(rank, (7, WIDTH)) for rank in range(WORLD)]).sum(0)[communicator.rows(7)]
        report[algorithm, "reduce_scatter"] = ((own - exact).norm() / exact.norm()).item()
        report[algorithm, "refused"] = refusals(communicator, site)
    if codec == "int4_group32":
        report["overflow"] = overflow(communicator, site)
    report["traffic"], report["packing"] = communicator.codecs.traffic.total(), communicator.codecs.traffic.packing
    return report


def refusals(communicator, site: str) -> list[str]:
    """What each operation says to a NaN that only rank 1 has, in the last row; then the group still sums."""
    device = communicator.device
    bad = partial(communicator.rank, (7, WIDTH)).to(device)
    if communicator.rank == 1:
        bad[6, 100] = math.nan
    shard = torch.zeros(communicator.row_counts(7)[communicator.rank], WIDTH, device=device)
    short = bad[6:].clone()
    said = []
    for call in (
        lambda: communicator.all_reduce(bad.clone(), site=site),
        lambda: communicator.reduce_scatter(bad, site=site),
        lambda: communicator.start_all_reduce(bad.clone(), site=site).wait(),
        lambda: communicator.all_reduce_rms_norm(bad.clone(), shard, torch.ones(WIDTH, device=device), 1e-5, site=site),
        lambda: communicator.all_reduce(short, site=site),
    ):
        try:
            call()
            said.append("nothing")
        except NonFiniteError as error:
            said.append(f"{error.rank} {error.site}: {error}")
    total = communicator.all_reduce(torch.ones(1, WIDTH, device=device), site=site)
    assert not shard.any() and 0.5 < total.min() and total.max() < 4.5      # static scales of few batches saturate early
    return said


def overflow(communicator, site: str) -> list[str]:
    """A star's root finds the sum of the last rank's rows beyond fp16, when the others' pieces are fine: all are told, all go on."""
    communicator.choice = Fixed(Route("star", "int4_group32"))
    x = torch.ones(6, WIDTH, dtype=torch.float16, device=communicator.device)
    x[4] = 60_000
    said = []
    for _ in range(2):
        try:
            communicator.reduce_scatter(x, site=site)
            said.append("nothing")
        except NonFiniteError as error:
            said.append(str(error))
    assert communicator.all_reduce(torch.ones(1, WIDTH, device=communicator.device), site=site).min() > 2
    return said


@pytest.fixture(scope="module", params=[*NAMES, "int4_outliers without row factors"])
def ranks(request):
    outcomes = on_ranks(in_rank, (request.param,), WORLD)
    assert not any(outcome.error for outcome in outcomes), outcomes[0].traceback or outcomes[1].traceback
    return request.param.split()[0], [outcome.result for outcome in outcomes]


def test_ranks_hold_the_same_bits_and_the_sum(ranks):
    codec, reports = ranks
    bound = {"int4_outliers": 0.1, "int4_group32": 0.45, "int8_group32": 0.03}[codec]       # of the summands' norms; a sum of zeros is 0.58
    for algorithm in ("one_shot", "two_shot", "star"):
        for dtype in DTYPES:
            for shape in SHAPES:
                each = [report[algorithm, str(dtype), shape] for report in reports]
                assert len({bits for *_, bits in each}) == 1, (algorithm, dtype, shape)
                assert max(error for error, *_ in each) < bound, (algorithm, dtype, shape, each)
        assert max(report[algorithm, "reduce_scatter"] for report in reports) < 2 * bound


def test_ranks_send_as_few_bits_as_promised(ranks):
    """All that is handed to torch.distributed, status bytes too: quantise-once sends each value to N-1 peers, two-hop 1/N of it twice."""
    codec, reports = ranks
    values = 40 * WIDTH
    bits = {"int4_outliers": 4 + (12 * 2 + 16) / WIDTH, "int4_group32": 4.5, "int8_group32": 8.5}[codec]
    for algorithm, copies in (("one_shot", WORLD - 1), ("two_shot", 2 * (WORLD - 1) / WORLD)):
        sent = [report[algorithm, "torch.bfloat16", (40, WIDTH)][1] for report in reports]
        assert max(sent) * 8 <= bits * values * copies * 1.02 + 8 * 40, (algorithm, sent)


def test_a_device_packs_its_own(ranks):
    """Where there is one; on the CPU there is nobody to tell of."""
    device = os.environ.get(DEVICE_VARIABLE, "cpu")
    for rank, report in enumerate(ranks[1]):
        assert report["packing"].startswith(f"packed on {device}") == (device != "cpu" and rank != 1), report["packing"]


def test_only_static_scales_saturate(ranks, request):
    total = ranks[1][0]["traffic"]
    assert total.values and (total.saturated > 0) == ("without row factors" in request.node.callspec.id)


def test_nan_is_refused_on_every_rank(ranks):
    codec, reports = ranks
    for algorithm in ("one_shot", "two_shot", "star"):
        said = [report[algorithm, "refused"] for report in reports]
        assert said[0] == said[1] == said[2]
        for text in said[0]:
            assert text.startswith("1 layers.0.o_proj: rank 1's values at layers.0.o_proj hold NaN or Inf") and codec in text


def test_an_overflowing_sum_is_refused():
    """Two-hop: fp16 summands that are finite and whose sum is not."""
    coding = GroupCoding(4, "s", 0, torch.float16, TORCH, Traffic())
    coding.encode(torch.full((4,), math.inf, dtype=torch.float16), 0, "sum")
    with pytest.raises(NonFiniteError, match="the sum at s, taken by rank 0"):
        coding.finish()


def test_a_sum_that_one_rank_would_get_is_refused_by_all(ranks):
    if "overflow" in ranks[1][0]:
        said = [report["overflow"] for report in ranks[1]]
        assert said[0] == said[1] == said[2] and all("the sum at layers.0.o_proj, taken by rank 0" in text for text in said[0])
