"""Seeded faults in the Hopper kernels: each is put into a copy of csrc/hopper, and the scenarios of late ranks must catch it.

Orders that are too weak show because the executor's memory is weak: relaxed stores are seen late and relaxed loads give what was there
before (csrc/simt/weak_memory.h). A fault counts as caught when some rank complains, or the executor does.
"""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import hopper_scenarios as scenarios
import pytest
import torch
from hetero_attn_hopper.kernels import source_of
from native import needs_compiler

from hetero_attn.jit import csrc_dir
from hetero_attn.testing.collective_cases import FULL
from hetero_attn.testing.simt import Program

pytestmark = needs_compiler
PUT, GET = "put_release(slot_of(call, other, epoch", "word = get_acquire(slot);"
ENTRY = "if (!begins(call, channel, epoch) || !meet(call, channel, ++epoch, 1, told)) return;"
NOT_MET = """if (!begins(call, channel, epoch)) return;
  epoch++;
  if (threadIdx.x < call.world) {
    told.offset[threadIdx.x] = call.offset;
    told.tensor[threadIdx.x] = call.buffer[threadIdx.x] + call.offset;
  }
  __syncthreads();"""
EXIT = "if (meet(call, channel, ++epoch, 2, told)) ends(call, channel, epoch);"
SCATTER_EXIT = "if (meet(call, blockIdx.x, ++epoch, 2, told)) ends(call, blockIdx.x, epoch);        // until then"


@dataclass(frozen=True)
class Fault:
    """Replace `old` by `new` in one file under csrc/hopper. scenario, world, options: by which it must be caught. counted: by the checker
    of races; says: what one of the complaints must hold."""

    file: str
    old: str
    new: str
    scenario: Any = scenarios.fused
    world: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    setting: dict[str, Any] = field(default_factory=dict)
    counted: bool = False
    says: str = ""
    quick: bool = False                # in every run; the others with HETERO_ATTN_FULL=1


FUSED = "all_reduce_rms_norm.cu"
# Reading too late is no matter of the order of memory: there a rank sleeps between meeting the others (its third barrier) and reading.
SLOW_READER = {"weak": False, "stall_barrier": 3}
ONE_SHOT = {"scenario": scenarios.all_reduce, "options": {"symmetric": False}, "setting": {"stage": 8192, **SLOW_READER}}
FAULTS = {
    "the put is relaxed": Fault("barrier.cuh", PUT, PUT.replace("release", "relaxed"), quick=True),
    "the wait is relaxed": Fault("barrier.cuh", GET, GET.replace("acquire", "relaxed"), quick=True),
    "no meeting before": Fault(FUSED, ENTRY, NOT_MET, quick=True),
    "no meeting after": Fault(FUSED, EXIT, "ends(call, channel, epoch);", quick=True),
    "the block does not gather before it puts": Fault(
        "barrier.cuh", "  __syncthreads();                     // what all threads", "  // what all threads",
        options={"width": 520}, quick=True),
    "a rank waits for itself alone": Fault(
        "barrier.cuh", "slot_of(call, call.rank, epoch, channel, other), epoch",
        "slot_of(call, call.rank, epoch, channel, call.rank), epoch", quick=True),
    "meetings are not counted": Fault(
        "barrier.cuh", "if (threadIdx.x == 0) *(own_word(call, EPOCHS_AT) + channel) = epoch;", "(void)epoch;"),
    # A CTA without rows speaks for one that sleeps, behind its fifth barrier, before it gives its row.
    "all CTAs meet at one slot": Fault(
        "barrier.cuh", "((epoch & 1) * CHANNELS + channel) * MAX_RANKS", "((epoch & 1) * CHANNELS) * MAX_RANKS",
        options={"rows": 3}, setting={"stall_barrier": 5}),
    "rows of the next rank": Fault(
        FUSED, "const long long in_x = (call.first + own) * units", "const long long in_x = (call.first + own + call.rank) * units",
        quick=True),
    "the last row is forgotten": Fault(FUSED, "own < call.count; own", "own < call.count - 1; own"),
    "the residual is not written": Fault(
        FUSED, "      store_own(call.residual, call.residual_kind, in_shard + unit, y);\n    }\n    if (call",
        "    }\n    if (call"),
    "sums in bf16": Fault(
        "door.cuh", "total.at[i] += part.at[i];", "total.at[i] = rounded(total.at[i] + part.at[i], X_KIND);", world=3,
        setting={"multicast": False}, quick=True),
    "half of the warps' sums": Fault(
        FUSED, "value = lane < warps ? sums[lane] : 0.0f;", "value = lane < (warps + 1) / 2 ? sums[lane] : 0.0f;",
        options={"width": 520}),
    "sums written while they are read": Fault(FUSED, "  __syncthreads();                     // the sums may be written again\n", "",
                                              options={"width": 520, "post": True}, counted=True, says="races with thread", quick=True),
    "Gemma's offset is left out": Fault(FUSED, "(weight + call.weight_offset)", "weight", options={"weight_offset": 1.0}),
    "offsets are taken to be one's own": Fault("barrier.cuh", "call.buffer[other] + told.offset[other]", "call.buffer[other] + call.offset",
                                               world=3, options={"uneven": True}, quick=True),
    "unlike offsets go to the switch": Fault("door.cuh", "alike = alike && told.offset[rank] == told.offset[0];", "alike = true;", world=3,
                                             options={"uneven": True}),
    "x is free before the others have read it": Fault("collectives.cu", SCATTER_EXIT, "ends(call, blockIdx.x, epoch);        // until then",
                                                      scenario=scenarios.scatter_and_gather, setting=SLOW_READER, quick=True),
    "one staging buffer": Fault("collectives.cu", "call.staging + (epoch & 1) *", "call.staging + 0 *", quick=True, **ONE_SHOT),
    "the end of x is not a unit": Fault("collectives.cu", "(call.elements + UNIT - 1) / UNIT", "call.elements / UNIT",
                                        **ONE_SHOT | {"options": {"symmetric": False, "elements": 1003}}),
    "a wait without an end": Fault("barrier.cuh", "if (nanoseconds() - began > (unsigned long long)call.timeout_ns) return LATE;", "",
                                   scenario=scenarios.absent, setting={"timeout_s": 0.3, "time_limit_s": 1.0}, says="has waited 1 s",
                                   quick=True),
    "the wrong rank is blamed": Fault("barrier.cuh", "(unsigned long long)other << 48", "(unsigned long long)call.rank << 48",
                                      scenario=scenarios.absent, setting={"timeout_s": 0.3, "lates": 1},
                                      says="the error lacks ['rank 1 did not come']"),
}


TRIED = [name for name, fault in FAULTS.items() if fault.quick or FULL]


def sources(fault: Fault):
    operations = {scenarios.fused: ["all_reduce_rms_norm"], scenarios.absent: ["all_reduce_rms_norm"]}.get(fault.scenario, ["all_reduce"])
    dtype = torch.float32 if fault.scenario is scenarios.absent else torch.bfloat16
    return [source_of(each, dtype, "multimem" if fault.setting.get("multicast", True) else "unicast") for each in operations]


def put_to(fault: Fault, root=None) -> list[str]:
    setting = {"weak": not fault.counted, "counted": fault.counted, "root": root, "options": fault.options} | fault.setting
    if root is not None:
        setting.setdefault("timeout_s", 1.0)             # a fault may well be waited for
    if fault.scenario is scenarios.absent:
        setting |= {"weak": False, "options": None}
    return scenarios.complaints(fault.scenario, fault.world, **setting)


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """All copies, compiled side by side and before any is tried: a fault that does not compile is an error, not caught."""
    made, jobs = {}, []
    for name in TRIED:
        fault = FAULTS[name]
        root = tmp_path_factory.mktemp("fault") / "csrc"
        shutil.copytree(csrc_dir() / "hopper", root / "hopper")
        path = root / "hopper" / fault.file
        text = path.read_text()
        assert text.count(fault.old) == 1, f"{name}: {fault.old!r} stands {text.count(fault.old)} times in {fault.file}"
        path.write_text(text.replace(fault.old, fault.new))
        made[name] = root
        jobs += [Program(root / source.source, source.defines, counted=fault.counted) for source in sources(fault)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda program: program.kernel.build(), jobs))
    return made


@pytest.mark.parametrize("name", TRIED)
def test_a_fault_is_caught(copies, name):
    found = put_to(FAULTS[name], copies[name])
    assert found, f"nobody noticed: {name}"
    assert FAULTS[name].says in " ".join(found), found


def test_without_a_fault_nothing_is_caught():
    """The control of all of the above: the same scenarios on the kernels as they are."""
    seen = []
    for fault in (FAULTS[name] for name in TRIED):
        key = (fault.scenario, fault.world, repr(fault.options), repr(fault.setting), fault.counted)
        if key not in seen:
            seen.append(key)
            assert put_to(fault) == []
