"""The ascend communicator on real ranks: the collectives suite with npu_mm_all_reduce_base run by a CPU reference under its real schema.

The group that the reference sums over is gloo's; HCCL itself is absent. What holds here: which calls take the operator and that all ranks
agree on it, what is passed, whose bias counts, and that everything else is the base's.
"""

import dataclasses
import logging
import os
from contextlib import contextmanager

import pytest
import torch
from ascend_stand_in import load_torch_npu, missing

if missing():
    pytest.skip(missing(), allow_module_level=True)

import ascend_operators
from hetero_attn_ascend.hccl import MIN_ROWS, HcclCommunicator, fusion_objections, hccl_communicator
from hetero_attn_ascend.launcher import DeviceLauncher
from schedule_models import apart, family_decoder, run_batch
from tiny_families import SMALL

from hetero_attn.communicator import Communicator
from hetero_attn.models.schedule_setup import make_schedule
from hetero_attn.profile import load_profile
from hetero_attn.testing.collectives import verdict, whole_suite
from hetero_attn.testing.ranks import on_ranks
from hetero_attn.testing.tolerances import mismatch


class EmulatedLauncher(DeviceLauncher):
    device = "cpu"

    def load(self):
        torch_npu = load_torch_npu()
        ascend_operators.register()
        return torch_npu

    def group_name(self, base):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        ascend_operators.groups["emulated"] = torch.distributed.new_group(backend="gloo")
        return "emulated"


PROFILE = load_profile("cpu")


def made(base) -> HcclCommunicator:
    communicator = hccl_communicator(base, PROFILE, EmulatedLauncher())
    assert isinstance(communicator, Communicator), communicator
    return communicator


def suite(base):
    return whole_suite(made(base))


def products(base):
    """Rows enough for the operator, in both dtypes, with bias nowhere, on rank 0, everywhere; K unequal, and 0 on one rank."""
    communicator = made(base)
    found = []
    for dtype in (torch.float16, torch.bfloat16):
        for bias_on in ("nobody", "rank 0", "everybody"):
            for columns in ((24, 24), (8, 40), (48, 0)):
                generator = torch.Generator().manual_seed(3)
                x, weight = torch.randn(2, MIN_ROWS, 48, generator=generator).to(dtype), torch.randn(20, 48, generator=generator).to(dtype)
                bias = torch.randn(20, generator=generator).to(dtype)
                start = sum(columns[: base.rank])
                own = slice(start, start + columns[base.rank])
                given = bias if bias_on == "everybody" or (bias_on == "rank 0" and base.rank == 0) else None
                out = communicator.linear_all_reduce(x[..., own], weight[:, own], given, site="the same for all")
                want = x.double() @ weight.double().T + (0 if bias_on == "nobody" else bias.double())
                found.append((f"{dtype} {bias_on} {columns}", mismatch(out, want, dtype, magnitude=8.0)))
    one_row = communicator.linear_all_reduce(torch.ones(1, 4), torch.ones(3, 4), site="decode")
    assert (one_row == 4 * base.world_size).all()
    fused = ascend_operators.calls["matmul_all_reduce", False]
    return [line for line in found if line[1]], fused


def refusals(base):
    profile = dataclasses.replace(PROFILE, codec="int8_group32")
    away = hccl_communicator(base, PROFILE, DeviceLauncher())
    coded = hccl_communicator(base, profile, EmulatedLauncher())
    summed = coded.linear_all_reduce(torch.ones(MIN_ROWS, 4).half(), torch.ones(3, 4).half(), site="o")
    return coded.fused_linear_reasons(torch.float16), away, bool((summed == 4 * base.world_size).all())


class NoName(EmulatedLauncher):
    """HCCL makes the group and knows no name of it, on the last rank alone."""

    def group_name(self, base):
        name = super().group_name(base)
        if base.rank == base.world_size - 1:
            raise RuntimeError("no room for another name\nand more")
        return name


@contextmanager
def logged():
    """What the project's logger says meanwhile."""
    lines, logger = [], logging.getLogger("hetero_attn")
    handler, level = logging.Handler(), logger.level
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def scheduled(base):
    """What make_schedule gives a small decoder, and what a step of 128 tokens then does: (schedule, cut, operator's calls, logits)."""
    found, counts = {}, [50, 50, 28]
    for name, communicator, dtype, sets in (
        ("half", made(base), torch.float16, []), ("fp32", made(base), torch.float32, []), ("no operator", base, torch.float16, []),
        ("asked", made(base), torch.float16, ["schedule=weave"]),
    ):
        decoder = family_decoder("llama3.1", communicator, dtype=dtype)
        with logged() as said:
            decoder.schedule = make_schedule(decoder, load_profile("cpu", sets=["overlap.min_tokens=64", *sets]))
        before = ascend_operators.calls["matmul_all_reduce", False]
        cut = decoder.schedule.cut(counts, counts)
        logits = run_batch(decoder, [0] * 3, counts)
        fused = ascend_operators.calls["matmul_all_reduce", False] - before
        found[name] = decoder.schedule.name, None if cut is None else str(cut), fused, logits, [line for line in said if "schedule" in line]
    return found


def unnamed(base):
    communicator = hccl_communicator(base, PROFILE, NoName())
    decoder = family_decoder("llama3.1", communicator, dtype=torch.float16)
    return communicator.fused_linear_reasons(torch.float16), make_schedule(decoder, PROFILE).name


def three_ranks(base):
    decoder = family_decoder("llama3.1", made(base), dtype=torch.float16)
    return make_schedule(decoder, PROFILE).name


def test_collectives_suite():
    outcomes = on_ranks(suite, (), 2)
    names = [] if any(outcome.error for outcome in outcomes) else list(outcomes[0].result)
    assert names, outcomes
    assert {name: words for name in names if (words := verdict(name, outcomes))} == {}


def test_products_take_the_operator():
    for outcome in on_ranks(products, (), 2):
        assert not outcome.error, outcome.traceback
        wrong, fused = outcome.result
        assert wrong == [] and fused == 18


def test_a_prefill_goes_through_the_operator():
    """auto leaves 128 tokens whole, so that each layer's two products are the operator's; what it cannot take is tiled by the schedule."""
    outcomes = on_ranks(scheduled, (), 2)
    for outcome in outcomes:
        assert not outcome.error, outcome.traceback
        found = outcome.result
        name, cut, fused, logits, said = found["half"]
        assert (name, cut, said) == ("whole", None, [])
        assert fused == 2 * SMALL["num_hidden_layers"]                                              # the decode step has too few rows
        assert found["fp32"][:3] == ("tiled", "32+32+32+32", 0)
        assert len(found["fp32"][4]) == (outcome is outcomes[0]) and all("float32, the operator has" in line for line in found["fp32"][4])
        assert found["no operator"][0] == "plain" and found["asked"][0] == "weave"                  # only auto is decided for
        assert apart(logits, found["no operator"][3]) < 0.02
        assert all(torch.equal(mine, other) for mine, other in zip(logits, outcomes[0].result["half"][3]))


def test_refusals_are_the_same_on_every_rank():
    outcomes = on_ranks(refusals, (), 3)
    assert all(not outcome.error for outcome in outcomes), outcomes[0].traceback
    coded, away, right = outcomes[0].result
    assert any("world size is 3" in reason for reason in coded) and any("codec is int8_group32" in reason for reason in coded) and right
    assert any("device is cpu, npu_mm_all_reduce_base runs on npu" in reason for reason in away)
    assert all(outcome.result == outcomes[0].result for outcome in outcomes)
    assert [outcome.result for outcome in on_ranks(three_ranks, (), 3)] == ["tiled"] * 3


def test_a_group_without_a_name_on_one_rank_is_unfused_on_all():
    outcomes = on_ranks(unnamed, (), 2)
    assert all(not outcome.error for outcome in outcomes), outcomes[0].traceback
    reasons, name = outcomes[0].result
    assert outcomes[1].result == (reasons, name) and name == "tiled"
    assert reasons == ["rank 1: HCCL gives the group no name: no room for another name"]


def test_objections():
    half = torch.ones(20, 8, dtype=torch.float16)
    assert fusion_objections(half, torch.ones(4, 8, dtype=torch.float16)) == []
    assert "float16 and bfloat16" in fusion_objections(half.float(), torch.ones(4, 8))[0]
    assert "2 rows" in fusion_objections(half[:2], torch.ones(4, 8, dtype=torch.float16))[0]
    assert "one dtype" in fusion_objections(half, torch.ones(4, 8))[0]
