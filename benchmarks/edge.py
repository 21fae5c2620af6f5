"""Models larger than memory, streamed: make bench-edge, or python benchmarks/edge.py --help.

A 7B shape within 1 GiB a rank, streamed against held, windows of several sizes, Accelerate's disk offload, a 70B shape, ranks behind slow
links. Random weights, written to --scratch and deleted at the end (30 GB of disk; --quick: 8, and a few minutes). Parts run one by one
(--only) and add to the same report, docs/measured/edge.md and .png; what was broken off goes on with --resume.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "backends")]

from edge import parts, report, throttle, verdicts  # noqa: E402  (the package of this name, not this file)
from edge.record import Enough, Record  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(parts.PARTS), action="append", help="this part alone (repeatable)")
    parser.add_argument("--quick", action="store_true", help="the 1B shape instead of the 7B one, fewer windows and ranks")
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp/hetero-attn-edge"), help="a folder on the disk to measure")
    parser.add_argument("--keep", action="store_true", help="leave checkpoints and slices there, for the next run")
    parser.add_argument("--throttle", type=float, default=250.0, metavar="MB/S",
                        help="reads of a process with a disk of its own (250); the disk must give four times as much")
    parser.add_argument("--write", metavar="STEM", nargs="?", const="", help="add to docs/measured/STEM.json, .md and .png "
                                                                            "(edge; with --quick edge_quick)")
    parser.add_argument("--resume", action="store_true", help="with --write: leave out what the JSON has already")
    parser.add_argument("--steps", type=int, metavar="N", help="stop after so many measurements")
    parser.add_argument("--json", action="store_true", help="print the figures instead of the report")
    return parser.parse_args()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    asked, started = arguments(), time.perf_counter()
    if asked.resume and asked.write is None:
        raise SystemExit("--resume goes on with a report: give --write too")
    asked.scratch.mkdir(parents=True, exist_ok=True)
    before = set(asked.scratch.iterdir())

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", file=sys.stderr, flush=True)

    stem = ROOT / "docs" / "measured" / (asked.write or ("edge_quick" if asked.quick else "edge"))
    record = Record(stem.with_suffix(".json") if asked.write is not None else None, parts.machine, resume=asked.resume, steps=asked.steps)
    run = parts.Run(asked.scratch, asked.quick, asked.keep, asked.throttle, say, record)
    try:
        for name in asked.only or parts.PARTS:
            parts.PARTS[name](run)
    except Enough:
        say("as many steps as asked for; go on with --resume")
    finally:
        throttle.sweep()
        if not asked.keep:                           # what this run made, and nobody else's
            for each in set(asked.scratch.iterdir()) - before:
                shutil.rmtree(each, ignore_errors=True)
            if not any(asked.scratch.iterdir()):
                asked.scratch.rmdir()
    if asked.write is not None:
        report.draw(stem.with_suffix(".png"), record.results)
        stem.with_suffix(".md").write_text(report.markdown(record.results, f"{stem.name}.png"))
    print(json.dumps(record.results) if asked.json else report.markdown(record.results, None))
    return 0 if all(passed for _, passed in verdicts.verdicts(record.results)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
