"""Seeded faults in the Triton kernels: each is put into a copy of the kernels' source, and small cases of the suite must catch it.

The control runs the same cases on an unchanged copy. Runs in the interpreter, in a process of its own, as test_triton_conformance.py does.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from hetero_attn.testing.attention import broken_promises
from hetero_attn.testing.cases import AttentionCase

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from triton_emulated import InterpretedLauncher, triton_emulated
else:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own: test_in_the_interpreter")

FOLDER = Path(__file__).parents[1] / "backends" / "hetero_attn_triton"
PLAIN = AttentionCase("plain", torch.float16, batch=1, q_len=40, kv_len=75, q_heads=2, kv_heads=1, head_dim=32, lse="never")
CAUSAL = replace(PLAIN, name="causal", is_causal=True)
SPLIT = replace(PLAIN, name="split", q_len=2, kv_len=260, is_causal=True)
WINDOW = replace(PLAIN, name="window", window_size=(35, 2))
PAGES = replace(PLAIN, name="pages", sequences=((20, 75), (3, 9)), page_size=24, is_causal=True)


@dataclass(frozen=True)
class Fault:
    """Replace `old` by `new` (every place) in one kernel file. cases: of which at least one must fail."""

    old: str
    new: str
    cases: tuple[AttentionCase, ...]
    file: str = "attention_kernel"


FAULTS = {
    "causality one key short": Fault("keys[None, :] <= position[:, None] + right", "keys[None, :] < position[:, None] + right", (CAUSAL,)),
    "a window one key long": Fault("keys[None, :] >= position[:, None] - left", "keys[None, :] >= position[:, None] - left - 1", (WINDOW,)),
    "whole blocks up to the last row's": Fault("whole_high = tl.maximum(tl.minimum(first_position",
                                               "whole_high = tl.maximum(tl.minimum(last_position", (CAUSAL,)),
    "whole blocks begin too early": Fault("(whole_low + BLOCK_N - 1) // BLOCK_N * BLOCK_N", "whole_low // BLOCK_N * BLOCK_N", (WINDOW,)),
    "sums of values not rescaled": Fault("acc = acc * factor[:, None]\n        if GUARD", "acc = acc\n        if GUARD", (PLAIN,)),
    "sum of weights not rescaled": Fault("total = total * factor + tl.sum(p, 1)", "total = total + tl.sum(p, 1)", (PLAIN,)),
    "positions from the upper left corner": Fault("position = query + kv_len - q_len", "position = query", (CAUSAL,)),
    "heads of a group mixed up": Fault("head // GROUP", "head % KV_HEADS", (replace(PLAIN, q_heads=4, kv_heads=2),)),
    "folded heads in the order of positions": Fault("kv_head * HEADS + offs_m % HEADS", "kv_head * HEADS + offs_m // BLOCK_M", (SPLIT,)),
    "a slot taken from the sequence": Fault("slots = (keys % PAGE_SIZE)", "slots = (keys % 16)", (PAGES,)),
    "pages of the first sequence for all": Fault("TABLE += wide_batch * table_batch", "TABLE += 0", (PAGES,)),
    "values that are not finite are summed": Fault("if tl.max(tl.max((acc != acc).to(tl.int32), 1), 0) != 0:", "if False:",
                                                   (replace(CAUSAL, poison="nan"),)),
    "rows that see a bad value do not show it, others do": Fault("tainted[:, None] != 0", "tainted[:, None] == 0",
                                                                 (replace(CAUSAL, poison="nan"),)),
    "a split's share cut short": Fault("share = (blocks + splits - 1) // splits", "share = blocks // splits", (SPLIT,)),
    "splits weighed alike": Fault("acc += tl.sum(part * share[:, None], 0)", "acc += tl.sum(part, 0)", (SPLIT,), "combine_kernel"),
    "a sink forgotten where splits become one": Fault("total += tl.exp2((sink - safe) * unit)", "total += 0.0", (
        replace(SPLIT, sinks=torch.float32, sink_values="large", lse="always"),), "combine_kernel"),
    "lse of base 2": Fault("top * (LN2 if PLAIN else 1.0)", "top", (replace(PLAIN, lse="always"),)),
    "a sink in other units": Fault("* (LOG2E if PLAIN else 1.0)\n            new_top", "* 1.0\n            new_top",
                                   (replace(PLAIN, sinks=torch.float32, sink_values="large", lse="always"),)),
    "softcap without its division": Fault("_tanh(s / softcap)", "_tanh(s)", (replace(PLAIN, softcap=3.0),)),
    "ALiBi with a sign": Fault("tl.abs(position[:, None] - keys[None, :])", "(position[:, None] - keys[None, :])",
                               (replace(PLAIN, alibi=1),)),
    "a mask's -inf times log2(e)": Fault("p = tl.exp2((s - safe[:, None]) * LOG2E)", "p = tl.exp2(s * LOG2E - safe[:, None] * LOG2E)",
                                         (replace(PLAIN, mask="bias min"),)),
}


def faulty_kernels(fault: Fault | None, folder: Path) -> dict:
    """launching.kernels() of a copy with the fault in it."""
    modules = {}
    for name in ("attention_kernel", "combine_kernel"):
        text = (FOLDER / f"{name}.py").read_text()
        if fault is not None and fault.file == name:
            assert fault.old in text, f"{fault.old!r} does not stand in {name}.py"
            text = text.replace(fault.old, fault.new)
        path = folder / f"copied_{name}.py"
        path.write_text(text)
        spec = spec_from_file_location(f"copied_{name}_{folder.name}", path)
        modules[name] = module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return {"attention": modules["attention_kernel"].attention_forward, "combine": modules["combine_kernel"].attention_combine}


def complaints(fault: Fault | None, cases, folder: Path) -> list[str]:
    with triton_emulated(InterpretedLauncher(kernels_=faulty_kernels(fault, folder)), "triton-faulty"):
        return [line for case in cases for line in broken_promises(case, "triton-faulty")]


@inside
@pytest.mark.parametrize("name", FAULTS if INTERPRETED else [])
def test_a_fault_is_caught(name, tmp_path):
    assert complaints(FAULTS[name], FAULTS[name].cases, tmp_path), f"nobody noticed: {name}"


@inside
def test_without_a_fault_nothing_is_caught(tmp_path):
    assert complaints(None, dict.fromkeys(case for fault in FAULTS.values() for case in fault.cases), tmp_path) == []


@pytest.mark.skipif(INTERPRETED, reason="this is the process of its own")
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=0", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert f"{len(FAULTS) + 1} passed" in done.stdout
