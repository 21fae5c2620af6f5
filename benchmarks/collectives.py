"""The collectives beside gloo, OpenMPI and the cost model: make bench-collectives, or python benchmarks/collectives.py --help.

One host over shared memory, a stress of 50,000 calls, emulated 300 Mbit/s links (root only, skipped with the reason otherwise), a prefill's
sum through the low-bit codecs over them, and what the codecs cost a model. Ratios count, taken within one run. The table goes to stdout,
progress to stderr; --write puts markdown, plots and JSON into docs/measured. Exit code 1: a required line fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "backends")]

from collectives import accuracy, bars, emulated, one_host, payload, plots, report, stress  # noqa: E402  (the package of this name)
from cpu import machine  # noqa: E402
from links import LinksError, RankError, unavailable  # noqa: E402

PARTS = ("one_host", "stress", "emulated", "payload", "accuracy")
NEED_LINKS = ("emulated", "payload")


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone (repeatable)")
    parser.add_argument("--without", choices=PARTS, action="append", default=[],
                        help="everything but this part (repeatable); accuracy takes half an hour the first time")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, calls, windows and draws; the verdicts are then of less worth")
    parser.add_argument("--cache", metavar="FOLDER", type=Path, default=cache_folder(),
                        help="where the accuracy's pieces are kept (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything measured to FILE")
    parser.add_argument("--write", metavar="STEM", nargs="?", const="collectives",
                        help="write docs/measured/STEM.md, STEM.json and plots (default stem: collectives)")
    return parser.parse_args(argv)


def cache_folder() -> Path:
    """codec_accuracy in the project's cache folder (HETERO_ATTN_CACHE_DIR, XDG_CACHE_HOME or ~/.cache)."""
    own, base = os.environ.get("HETERO_ATTN_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME", "")
    parent = Path(own).expanduser() if own else Path(base if os.path.isabs(base) else Path.home() / ".cache") / "hetero_attn"
    return parent / "codec_accuracy"


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))          # an orderly end: ranks and namespaces go too
    asked = arguments()
    torch.set_num_threads(1)
    started = time.perf_counter()

    def progress(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", file=sys.stderr, flush=True)

    facts = machine.describe("cpu", 1)
    progress(machine.headline(facts))
    quick, parts = asked.quick, [part for part in asked.only or PARTS if part not in asked.without]
    steps = {
        "one_host": lambda: one_host.measure(0.4 if quick else 2.0, progress),
        "stress": lambda: stress.measure(2_000 if quick else bars.STRESS_CALLS, progress),
        "emulated": lambda: emulated.measure(2 if quick else emulated.ROUNDS, emulated.CONFIGURATIONS[1:2] if quick
                                             else emulated.CONFIGURATIONS, progress),
        "payload": lambda: payload.measure(2 if quick else 7, payload.RANKS, progress),
        "accuracy": lambda: accuracy.measure(*((2, 1) if quick else (accuracy.WINDOWS, accuracy.DRAWS)), asked.cache, progress),
    }
    results, skipped, no_links, failed = {}, {}, unavailable(), False
    for part in parts:
        if part in NEED_LINKS and no_links:
            skipped[part] = no_links
            progress(f"{part}: skipped: {no_links}")
            continue
        try:
            results[part] = steps[part]()
            for line in results[part].verdicts():
                progress(f"  {line}")
        except (LinksError, RankError, RuntimeError) as error:       # the other parts' figures are worth keeping
            skipped[part], failed = f"failed: {str(error).splitlines()[0]}", True
            print(error, file=sys.stderr)
    progress("done")

    files = {}
    if asked.write:
        stem = ROOT / "docs" / "measured" / asked.write
        files = plots.draw(stem, f"{facts['processor']}, {facts['level']}, {facts['cores']} cores, {facts['date']}", results)
        stem.with_name(f"{asked.write}.md").write_text(report.markdown(facts, results, skipped, files))
    everything = json.dumps(report.as_json(facts, results, skipped), indent=1) + "\n"
    for file in filter(None, (asked.json, asked.write and ROOT / "docs" / "measured" / f"{asked.write}.json")):
        file.write_text(everything)
    print(report.markdown(facts, results, skipped, files))
    return 1 if failed or not all(line.passed for line in report.all_verdicts(results)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
