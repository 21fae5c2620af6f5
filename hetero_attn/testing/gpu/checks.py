"""The list of what `make gpu-check` runs, in order, and how one of them is run: whatever it raises is a failed outcome, not the end.

Checks that start processes of their own come first, so that a fault in one cannot spoil the figures of another.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hetero_attn import registry
from hetero_attn.spec import dtype_name
from hetero_attn.testing.attention_cases import plain_cases
from hetero_attn.testing.collectives import suite_names
from hetero_attn.testing.gpu import attention_bench, ceilings, cooperation, graphs, group_graphs, group_suite, groups, norm_bench
from hetero_attn.testing.gpu.apart import apart
from hetero_attn.testing.gpu.children import child, ended, last_words, started
from hetero_attn.testing.gpu.outcome import FAILED, PASSED, Figure, Outcome, judged, skipped

LIMIT_S = 540                          # of one child: a part of a backend's suite
MINUTES = 25.0                         # of the whole run, --minutes
QUICK_SHARE = 12                       # with --quick, one case in so many


@dataclass
class Run:
    """What checks share: the device, --quick, and the ceilings once they are measured."""

    device: torch.device
    quick: bool = False
    known: ceilings.Ceilings | None = None
    deadline: float = math.inf           # of time.monotonic()

    def left_s(self) -> float:
        """How long a child may take. Raises TimeoutError where the run's time is up."""
        left = min(LIMIT_S, self.deadline - time.monotonic())
        if left <= 0:
            raise TimeoutError("the run's time is up; --minutes gives it more")
        return left

    def ceilings(self) -> ceilings.Ceilings:
        if self.known is None:
            self.known = ceilings.measured(self.device, self.quick)
        return self.known


@dataclass(frozen=True)
class Check:
    """name: for --only. about: a line for --list. apart: whether it runs in a process of its own, see apart.py."""

    name: str
    about: str
    run: Callable[[Run], Outcome]
    apart: bool = False


def collected(name: str, done: subprocess.CompletedProcess) -> tuple[dict, str]:
    """What a child of `conform` said: its JSON, and a line. A child that died has {} and its last words."""
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            found = json.loads(line)
            counts = f"{found['passed']} passed, {found['objected']} objected to, {found['failures']} failed"
            rest = "" if found.get("whole", True) else f", then the process ended with {done.returncode}: {last_words(done.stderr)}"[:400]
            return found, f"{name}: {counts} in {found['seconds']} s{rest}"
    last = last_words(done.stderr.strip() or done.stdout)
    return {}, f"{name}: the process ended with {done.returncode}: {last}"[:600]


def conformance(run: Run) -> Outcome:
    """Every available backend that runs on the device, its suite dealt out to processes that share the compiler's cache."""
    lines, failed, details, ran = [], False, {}, 0
    for name in registry.names():
        if name == "reference":
            continue
        backend = registry.get(name)
        if reasons := registry.unavailable(backend):
            needed = name == "triton" and attention_bench.needs_triton(run.device)
            lines.append(f"{name}: {'must run here and does not' if needed else 'not here'}: {'; '.join(reasons)}")
            failed |= needed
            continue
        if all(backend.unsupported_reasons(case.spec(run.device.type)) for case in plain_cases()):
            lines.append(f"{name}: does not run on {run.device.type}")
            continue
        share = ["--share", str(QUICK_SHARE)] if run.quick else []
        found, said = in_parts(name, run, share)
        lines += said
        lines += [f"  {case}: {text.splitlines()[0]}" for case, text in list(found.get("failed", {}).items())[:5]]
        failed |= not found.get("whole") or found["failures"] > 0 or not found["passed"]
        details[name], ran = found, ran + 1
    return Outcome(FAILED if failed or not ran else PASSED, "\n".join(lines), details=details)


def in_parts(name: str, run: Run, share: list[str]) -> tuple[dict, list[str]]:
    """A backend's suite by several processes: their sums, and lines. "whole": every part ran to its end; what was done counts anyway."""
    parts = max(1, min(8, (os.cpu_count() or 1) // 2)) if run.device.type == "cuda" else 1
    options = ["--backend", name, "--device", run.device.type, *share]
    limit_s = run.left_s()
    processes = [started("hetero_attn.testing.gpu.conform", [*options, "--part", f"{part}/{parts}"]) for part in range(parts)]
    total = {"passed": 0, "objected": 0, "failures": 0, "failed": {}, "seconds": 0.0, "whole": True}
    lines = []
    for part, done in enumerate(ended(processes, limit_s)):
        found, line = collected(f"{name}, part {part + 1} of {parts}", done)
        for key in ("passed", "objected", "failures"):
            total[key] += found.get(key, 0)
        total["failed"] |= found.get("failed", {})
        total["seconds"] = max(total["seconds"], found.get("seconds", limit_s))
        if not found or not found.get("whole", True):
            total["whole"] = False
            lines.append(f"{line}; it did not end within {limit_s:.0f} s" if done.returncode == -signal.SIGKILL else line)
    counts = f"{total['passed']} passed, {total['objected']} objected to, {total['failures']} failed"
    return total, [f"{name}: {counts} in {total['seconds']} s", *lines]


def sanitizer(run: Run) -> Outcome:
    """compute-sanitizer's memcheck over small cases, where the tool is installed. Without torch's own pool of memory, in which a read
    beyond a tensor would be a read of the pool and nothing to report."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return skipped("compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")
    names = [name for name in ("triton", "hopper", "volta") if name in registry.names() and not registry.unavailable(registry.get(name))]
    if not names:
        return skipped("none of triton, hopper and volta is available here")
    lines, failed = [], False
    for name in names:
        done = child("hetero_attn.testing.gpu.conform", ["--backend", name, "--device", run.device.type, "--few"], run.left_s(),
                     (tool, "--tool", "memcheck", "--error-exitcode", "9"), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        clean = "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
        _, line = collected(name, done)
        failed |= not clean or done.returncode != 0
        lines.append(f"{line}; memcheck {'found nothing' if clean else 'found errors'}")
    return Outcome(FAILED if failed else PASSED, "\n".join(lines))


def limits(run: Run) -> Outcome:
    """The ceilings that shares are of."""
    found = run.ceilings()
    dtype = dtype_name(ceilings.narrow_dtype(run.device))
    figures = [Figure(f"{dtype} product", found.tflops, "TFLOP/s"), Figure("copy, read and written", found.gbps, "GB/s")]
    return judged("measured in this run", figures, [])


CHECKS = (
    Check("conformance", "the attention suite on every available backend, a process each", conformance),
    Check("twin", "the hopper communicator without multicast: two processes on one GPU", lambda run: groups.twin(run.device), True),
    Check("alone", "a world of one", lambda run: groups.alone(run.device), True),
    Check("mixed", "a group of one GPU rank and one CPU rank", lambda run: groups.mixed(run.device), True),
    Check("collectives", f"the collectives suite, {len(suite_names())} cases, on these three groups",
          lambda run: group_suite.suite(run.device, run.left_s(), run.quick), True),
    Check("graphs", "CUDA graphs: captured attention and norms against plain calls", lambda run: graphs.graphs(run.device), True),
    Check("replays", f"CUDA graphs of {len(group_graphs.EXCHANGES)} collectives, on the twin and alone, replayed on other inputs",
          lambda run: group_graphs.replays(run.device, run.left_s()), True),
    Check("sanitizer", "compute-sanitizer over small cases, where it is installed", sanitizer),
    Check("fused", "the fused all-reduce and norm, alone and as a pair on one GPU, beside add and norm",
          lambda run: groups.fused(run.device, quick=run.quick), True),
    Check("cooperation", "KV on the device against KV in host memory: logits, memory, times",
          lambda run: cooperation.cooperation(run.device, run.quick), True),
    Check("ceilings", "rate of 16-bit products, bandwidth of a copy", limits),
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


def carried_out(check: Check, run: Run, *, inside: bool = False) -> Outcome:
    """Run one check. inside: this is the process of its own."""
    begin = time.perf_counter()
    try:
        outcome = apart(check.name, run.device, run.quick, run.left_s()) if check.apart and not inside else check.run(run)
    except subprocess.TimeoutExpired as error:
        outcome = Outcome(FAILED, f"no end after {error.timeout:.0f} s")
    except Exception as error:
        outcome = Outcome(FAILED, f"{type(error).__name__}: {error}\n{''.join(traceback.format_exc().splitlines(True)[-4:])}")
    return dataclasses.replace(outcome, seconds=time.perf_counter() - begin)
