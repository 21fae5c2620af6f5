"""The cpu backend beside its peers and the machine's limits: make bench-cpu, or python benchmarks/cpu_attention.py --help.

Attention (six shapes, three dtypes, against torch SDPA, compiled FlexAttention and ONNX Runtime), the decoder's product, how cost grows,
and generation end to end. Ratios count, taken within one run, interleaved; every figure stands beside the limit of the same minutes. The
table goes to stdout, progress to stderr; --write puts markdown, plots and JSON into docs/measured. Exit code 1: a required line fails.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "backends")]

from cpu import attention, growth, limits, machine, model, plots, products, report  # noqa: E402

from hetero_attn import registry  # noqa: E402

PARTS = ("attention", "linear", "growth", "model")
ROUNDS = {"attention": 9, "linear": 9, "growth": 5, "model": 2}
QUICK = {"attention": 3, "linear": 3, "growth": 3, "model": 1}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cpu", help="whose attention and linear are ours (default: cpu)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone (repeatable)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything measured to FILE")
    parser.add_argument("--write", metavar="STEM", nargs="?", const="cpu_attention",
                        help="write docs/measured/STEM.md, STEM.json and plots (default stem: cpu_attention)")
    parsed = parser.parse_args()
    if parsed.threads < 1:
        parser.error(f"--threads is {parsed.threads}, expected at least 1")
    if parsed.backend not in registry.names():
        parser.error(f"--backend is {parsed.backend}, known here: {', '.join(registry.names())}")
    reasons = registry.unavailable(registry.get(parsed.backend))
    if reasons:
        parser.error(f"--backend {parsed.backend} does not run here: {'; '.join(reasons)}")
    return parsed


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))          # an orderly end: the model's 2.5 GB and its process go too
    asked = arguments()
    torch.set_num_threads(asked.threads)
    started = time.perf_counter()

    def progress(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", file=sys.stderr, flush=True)

    facts = machine.describe(asked.backend, asked.threads)
    progress(machine.headline(facts))
    l3, parts, rounds = machine.l3_bytes(), asked.only or PARTS, QUICK if asked.quick else ROUNDS
    fma = limits.fma_peak()
    results: dict = {}
    if "attention" in parts:
        results["attention"] = attention.measure(asked.backend, rounds["attention"], progress)
    if "linear" in parts:
        results["linear"] = products.measure(asked.backend, rounds["linear"], progress)
    if "growth" in parts:
        results["growth"] = growth.measure(asked.backend, rounds["growth"], progress)
    if "model" in parts:
        results["model"] = model.measure(asked.backend, rounds["model"], asked.threads, l3, progress)
    progress("done")

    files = {}
    if asked.write:
        stem = ROOT / "docs" / "measured" / asked.write
        files = plots.draw(stem, f"{facts['processor']}, {facts['level']}, {facts['threads']} threads, {facts['date']}", results)
        stem.with_name(f"{asked.write}.md").write_text(report.markdown(facts, fma, results, files))
    everything = json.dumps(report.as_json(facts, fma, results), indent=1) + "\n"
    for file in filter(None, (asked.json, asked.write and ROOT / "docs" / "measured" / f"{asked.write}.json")):
        file.write_text(everything)
    print(report.markdown(facts, fma, results, files))
    return 0 if all(line.passed for line in report.all_verdicts(results)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
