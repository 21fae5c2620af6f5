"""The list of what `make gpu-check` runs, in order, and how one of them is run: whatever it raises is a failed outcome, not the end.

Checks that start processes of their own come first, so that a fault in one cannot spoil the figures of another.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hetero_attn import registry
from hetero_attn.testing.attention_cases import plain_cases
from hetero_attn.testing.gpu import attention_bench, ceilings, graphs, groups, norm_bench
from hetero_attn.testing.gpu.outcome import FAILED, PASSED, Figure, Outcome, judged, skipped

LIMIT_S = 3000                         # of one backend's suite
QUICK_SHARE = 12                       # with --quick, one case in so many
ROOT = Path(__file__).parents[3]


@dataclass
class Run:
    """What checks share: the device, --quick, and the ceilings once they are measured."""

    device: torch.device
    quick: bool = False
    known: ceilings.Ceilings | None = None

    def ceilings(self) -> ceilings.Ceilings:
        if self.known is None:
            self.known = ceilings.measured(self.device, self.quick)
        return self.known


@dataclass(frozen=True)
class Check:
    """name: for --only. about: a line for --list."""

    name: str
    about: str
    run: Callable[[Run], Outcome]


def child(module: str, arguments: list[str], limit_s: float, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """python -m module in a process of its own, with this checkout in its path."""
    paths = [str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [*before, sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s)


def collected(name: str, done: subprocess.CompletedProcess) -> tuple[dict, str]:
    """What a child of `conform` said: its JSON, and a line. A child that died has {} and its last words."""
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            found = json.loads(line)
            counts = f"{found['passed']} passed, {found['objected']} objected to, {found['failures']} failed"
            return found, f"{name}: {counts} in {found['seconds']} s"
    last = " | ".join((done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-3:])
    return {}, f"{name}: the process ended with {done.returncode}: {last}"[:600]


def conformance(run: Run) -> Outcome:
    """Every available backend that runs on the device, a process each."""
    lines, failed, details, ran = [], False, {}, 0
    for name in registry.names():
        if name == "reference":
            continue
        backend = registry.get(name)
        if reasons := registry.unavailable(backend):
            lines.append(f"{name}: not here: {'; '.join(reasons)}")
            continue
        if all(backend.unsupported_reasons(case.spec(run.device.type)) for case in plain_cases()):
            lines.append(f"{name}: does not run on {run.device.type}")
            continue
        share = ["--share", str(QUICK_SHARE)] if run.quick else []
        done = child("hetero_attn.testing.gpu.conform", ["--backend", name, "--device", run.device.type, *share], LIMIT_S)
        found, line = collected(name, done)
        lines.append(line)
        lines += [f"  {case}: {text.splitlines()[0]}" for case, text in list(found.get("failed", {}).items())[:5]]
        failed |= not found or found["failures"] > 0 or not found["passed"]
        details[name], ran = found, ran + 1
    return Outcome(FAILED if failed or not ran else PASSED, "\n".join(lines), details=details)


def sanitizer(run: Run) -> Outcome:
    """compute-sanitizer's memcheck over small cases of the Triton backend, where the tool is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return skipped("compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")
    names = [name for name in ("triton", "hopper") if name in registry.names() and not registry.unavailable(registry.get(name))]
    if not names:
        return skipped("neither triton nor hopper is available here")
    lines, failed = [], False
    for name in names:
        done = child("hetero_attn.testing.gpu.conform", ["--backend", name, "--device", run.device.type, "--few"], LIMIT_S,
                     (tool, "--tool", "memcheck", "--error-exitcode", "9"))
        clean = "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
        _, line = collected(name, done)
        failed |= not clean or done.returncode != 0
        lines.append(f"{line}; memcheck {'found nothing' if clean else 'found errors'}")
    return Outcome(FAILED if failed else PASSED, "\n".join(lines))


def limits(run: Run) -> Outcome:
    """The ceilings that shares are of."""
    found = run.ceilings()
    figures = [Figure("bf16 product", found.tflops, "TFLOP/s"), Figure("copy, read and written", found.gbps, "GB/s")]
    return judged("measured in this run", figures, [])


CHECKS = (
    Check("conformance", "the attention suite on every available backend, a process each", conformance),
    Check("twin", "the hopper communicator without multicast: two processes on one GPU", lambda run: groups.twin(run.device)),
    Check("alone", "a world of one", lambda run: groups.alone(run.device)),
    Check("mixed", "a group of one GPU rank and one CPU rank", lambda run: groups.mixed(run.device)),
    Check("graphs", "CUDA graphs: captured calls against plain ones", lambda run: graphs.graphs(run.device)),
    Check("sanitizer", "compute-sanitizer over small cases, where it is installed", sanitizer),
    Check("ceilings", "rate of bf16 products, bandwidth of a copy", limits),
    Check("prefill", "prefill against torch SDPA and compiled FlexAttention",
          lambda run: attention_bench.prefill(run.device, run.ceilings(), run.quick)),
    Check("decode", "a decode step against the copy's bandwidth",
          lambda run: attention_bench.decode(run.device, run.ceilings(), run.quick)),
    Check("norm", "residual add and norm at hidden 8192", lambda run: norm_bench.norm(run.device, run.ceilings(), run.quick)),
)


def selected(only: str | None) -> list[Check]:
    """The checks that --only names, in the list's order; all without it. Raises ValueError naming what is unknown and what is known."""
    if only is None:
        return list(CHECKS)
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    known = [check.name for check in CHECKS]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"no check is called {', '.join(unknown)}; there are {', '.join(known)}")
    if not wanted:
        raise ValueError(f"it names no check; there are {', '.join(known)}")
    return [check for check in CHECKS if check.name in wanted]


def carried_out(check: Check, run: Run) -> Outcome:
    """Run one check."""
    begin = time.perf_counter()
    try:
        outcome = check.run(run)
    except subprocess.TimeoutExpired as error:
        outcome = Outcome(FAILED, f"no end after {error.timeout:.0f} s")
    except Exception as error:
        outcome = Outcome(FAILED, f"{type(error).__name__}: {error}\n{''.join(traceback.format_exc().splitlines(True)[-4:])}")
    return dataclasses.replace(outcome, seconds=time.perf_counter() - begin)
