"""Seeded faults in the Volta kernels: each is put into a copy of csrc/volta, and the tests' own means must catch it.

A fault counts as caught when the conformance check or the executor complains. Those that forget to synchronise are put to the checker of
races, which does not depend on the order in which threads happened to run; the others to the numbers.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hetero_attn_volta import VoltaBackend
from hetero_attn_volta.kernels import COMBINE, source_of
from native import needs_compiler

from hetero_attn import registry
from hetero_attn.jit import csrc_dir
from hetero_attn.testing.attention import check
from hetero_attn.testing.cases import AttentionCase
from hetero_attn.testing.simt import SimtError, SimtLauncher

pytestmark = needs_compiler
PLAIN = AttentionCase("plain", torch.float16, batch=1, q_len=40, kv_len=75, q_heads=2, kv_heads=1, head_dim=32, lse="always")
CAUSAL = replace(PLAIN, name="causal", is_causal=True)
DECODE = replace(PLAIN, name="decode", q_len=1, kv_len=200)
SPLIT = replace(PLAIN, name="split", q_len=2, kv_len=600, is_causal=True)


@dataclass(frozen=True)
class Fault:
    """Replace `old` by `new` in one file under csrc/volta. cases: of which at least one must fail. races: by the checker of races."""

    file: str
    old: str
    new: str
    cases: tuple[AttentionCase, ...]
    races: bool = False


FAULTS = {
    "no barrier between storing V and using it": Fault(
        "attend.cuh", "      meet();\n      if (key + stride < end) staged.load", "      if (key + stride < end) staged.load",
        (PLAIN,), True),
    "no barrier before the next round": Fault(
        "attend.cuh", "key + stride, end, nullptr, thread);\n      meet();", "key + stride, end, nullptr, thread);", (PLAIN,), True),
    "a column of the sums in the wrong place": Fault(
        "fragments.cuh", "return (e & 1) + 2 * bit(lane, 1) + (e & 4)", "return (e & 1) + 4 * bit(lane, 1) + (e & 4) / 2", (CAUSAL,)),
    "V in the keys' own order": Fault(
        "fragments.cuh", "2 * bit(step, 1) + 4 * bit(lane, 1) + 8 * bit(step, 2) + 16 * bit(step, 0) + 32 * (step >> 3)",
        "2 * bit(lane, 1) + 4 * step", (PLAIN,)),
    "causality one key short": Fault(
        "scores.cuh", "min(s.kv_len, position + call.right + 1)", "min(s.kv_len, position + call.right)", (CAUSAL,)),
    "a window one key long": Fault(
        "scores.cuh", "max(0, position - call.left)", "max(0, position - call.left - 1)",
        (replace(PLAIN, name="window", window_size=(9, 2)),)),
    "whole tiles one key too many": Fault(
        "attend.cuh", "key + KEYS <= whole_last", "key + KEYS <= whole_last + 1", (replace(CAUSAL, q_len=64, kv_len=126),)),
    "sums of values not rescaled": Fault(
        "attend.cuh", "out[r][f][e] *= rescale[bit(e, 1)];", ";", (replace(PLAIN, kv_len=150),)),
    "sum of weights not rescaled": Fault(
        "scores.cuh", "sum = sum * rescale + row_sum(added);", "sum = sum + row_sum(added);", (replace(PLAIN, kv_len=150),)),
    "half of the row's lanes left out of the maximum and the sum": Fault(
        "scores.cuh", "return x + __shfl_xor_sync(0xffffffffu, x, 8);", "return x;", (PLAIN,)),
    "heads of a group mixed up": Fault(
        "forward.cu", "kv_head = head / (call.q_heads / call.kv_heads)", "kv_head = head % call.kv_heads",
        (replace(PLAIN, q_heads=4, kv_heads=2),)),
    "a position within a page taken from the sequence": Fault(
        "staging.cuh", "(token - page * page_size) * token_stride", "token % 8 * token_stride",
        (replace(PLAIN, name="pages", sequences=((20, 75), (3, 9)), page_size=16),)),
    "values that are not finite multiplied by weights of zero": Fault(
        "attend.cuh", "if (bad) staged.store_finite", "if (false) staged.store_finite", (replace(CAUSAL, name="poison", poison="nan"),)),
    "ALiBi from the upper left corner": Fault(
        "scores.cuh", "row.query + s.kv_len - s.q_len - (first_key", "row.query - (first_key", (replace(PLAIN, name="alibi", alibi=1),)),
    "softcap without its division": Fault(
        "scores.cuh", "tanhf(scores[t][e] * inverse)", "tanhf(scores[t][e])", (replace(PLAIN, name="softcap", softcap=3.0),)),
    "a sink forgotten where splits become one": Fault(
        "combine.cu", "close_row(call, head, true,", "close_row(call, head, false,",
        (replace(SPLIT, sinks=torch.float32, sink_values="large"),)),
    "splits weighed alike": Fault(
        "combine.cu", "if (share != 0.0f) total += share *", "if (share != 0.0f) total += sum / call.splits *", (SPLIT,)),
    "lse of base 2": Fault(
        "scores.cuh", "base + logf(total)", "base + log2f(total)", (PLAIN, DECODE)),
    "warps of a decode block merged without waiting": Fault(
        "decode.cu", "      spoiled[at] = bit(int(group.spoiled), v1) ? 1.0f : 0.0f;\n    }\n  __syncthreads();",
        "      spoiled[at] = bit(int(group.spoiled), v1) ? 1.0f : 0.0f;\n    }", (DECODE,), True),
    "a warp of a decode block skips tiles": Fault(
        "decode.cu", "first + warp * KEYS, WARPS * KEYS,", "first + warp * KEYS, 2 * WARPS * KEYS,", (replace(DECODE, kv_len=300),)),
}


class Copy:
    """csrc/volta with a fault in it, and the launcher that runs it."""

    def __init__(self, name: str, fault: Fault | None, folder: Path) -> None:
        self.name, self.fault, self.root = name, fault, folder
        shutil.copytree(csrc_dir() / "volta", folder / "volta")
        if fault:
            path = folder / "volta" / fault.file
            text = path.read_text()
            assert text.count(fault.old) == 1, f"{name}: {fault.old!r} stands {text.count(fault.old)} times in {fault.file}"
            path.write_text(text.replace(fault.old, fault.new))
        self.launcher = SimtLauncher(root=folder, counted=bool(fault and fault.races))
        self.backend = VoltaBackend(self.launcher)

    def programs(self, cases):
        plans = [self.backend.plan(case.spec()) for case in cases]
        kernels = {source_of(each.variant) for each in plans} | ({COMBINE} if any(each.splits > 1 for each in plans) else set())
        return [self.launcher.program(kernel) for kernel in kernels]

    def complaints(self, cases) -> list[str]:
        found = []
        with registry.register("volta-faulty", lambda: self.backend):
            for case in cases:
                try:
                    check(case, "volta-faulty")
                except (AssertionError, SimtError) as complaint:
                    found.append(str(complaint))
        return found


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """All copies, compiled side by side."""
    made = {name: Copy(name, fault, tmp_path_factory.mktemp("fault") / "csrc") for name, fault in FAULTS.items()}
    jobs = [program for name, copy in made.items() for program in copy.programs(FAULTS[name].cases)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda program: program.kernel.build(), jobs))
    return made


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(copies, name):
    complaints = copies[name].complaints(FAULTS[name].cases)
    assert complaints, f"nobody noticed: {name}"
    if FAULTS[name].races:
        assert any("races with thread" in complaint for complaint in complaints), complaints


@pytest.mark.parametrize("counted", [False, True])
def test_without_a_fault_nothing_is_caught(tmp_path, counted):
    """The control of all of the above: the same cases on an unchanged copy, under the checker of races too."""
    copy = Copy("none", None, tmp_path / "csrc")
    copy.launcher.counted = counted
    cases = dict.fromkeys(case for fault in FAULTS.values() for case in fault.cases if not counted or fault.races)
    assert copy.complaints(cases) == []
