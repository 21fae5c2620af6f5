"""The ascend communicator on real ranks: the collectives suite with npu_mm_all_reduce_base run by a CPU reference under its real schema.

The group that the reference sums over is gloo's; HCCL itself is absent. What holds here: which calls take the operator and that all ranks
agree on it, what is passed, whose bias counts, and that everything else is the base's.
"""

import dataclasses
import os

import pytest
import torch
from ascend_stand_in import load_torch_npu, missing

if missing():
    pytest.skip(missing(), allow_module_level=True)

import ascend_operators
from hetero_attn_ascend.hccl import MIN_ROWS, HcclCommunicator, fusion_objections, hccl_communicator
from hetero_attn_ascend.launcher import DeviceLauncher

from hetero_attn.communicator import Communicator
from hetero_attn.profile import load_profile
from hetero_attn.testing.collectives import _verdict, _whole_suite
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
    return _whole_suite(made(base))


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
                site = f"{dtype} {bias_on} {columns}"
                out = communicator.linear_all_reduce(x[..., own], weight[:, own], given, site=site)
                want = x.double() @ weight.double().T + (0 if bias_on == "nobody" else bias.double())
                found.append((site, mismatch(out, want, dtype, magnitude=8.0)))
    one_row = communicator.linear_all_reduce(torch.ones(1, 4), torch.ones(3, 4), site="decode")
    assert (one_row == 4 * base.world_size).all()
    fused = sum(count for key, count in ascend_operators.calls.items() if key[0] == "matmul_all_reduce")
    return [line for line in found if line[1]], fused


def refusals(base):
    profile = dataclasses.replace(PROFILE, codec="int8_group32")
    return hccl_communicator(base, profile, EmulatedLauncher()), hccl_communicator(base, PROFILE, DeviceLauncher())


def test_collectives_suite():
    outcomes = on_ranks(suite, (), 2)
    names = [] if any(outcome.error for outcome in outcomes) else list(outcomes[0].result)
    assert names, outcomes
    assert {name: verdict for name in names if (verdict := _verdict(name, outcomes))} == {}


def test_products_take_the_operator():
    for outcome in on_ranks(products, (), 2):
        assert not outcome.error, outcome.traceback
        wrong, fused = outcome.result
        assert wrong == [] and fused == 12                          # not those where a rank holds no columns


def test_refusals_are_the_same_on_every_rank():
    outcomes = on_ranks(refusals, (), 3)
    assert all(not outcome.error for outcome in outcomes), outcomes[0].traceback
    coded, away = outcomes[0].result
    assert any("world size is 3" in reason for reason in coded) and any("codec is int8_group32" in reason for reason in coded)
    assert any("device is cpu, npu_mm_all_reduce_base runs on npu" in reason for reason in away)
    assert all(outcome.result == outcomes[0].result for outcome in outcomes)


def test_objections():
    half = torch.ones(20, 8, dtype=torch.float16)
    assert fusion_objections(half, torch.ones(4, 8, dtype=torch.float16)) == []
    assert "float16 and bfloat16" in fusion_objections(half.float(), torch.ones(4, 8))[0]
    assert "2 rows" in fusion_objections(half[:2], torch.ones(4, 8, dtype=torch.float16))[0]
    assert "one dtype" in fusion_objections(half, torch.ones(4, 8))[0]
