"""Models larger than memory, streamed: make bench-edge, or python benchmarks/edge.py --help.

A 7B shape within 1 GiB a rank, streamed against held, windows of several sizes, Accelerate's disk offload, a 70B shape. Random weights,
written to --scratch (30 GB; --quick: 10). Parts run one by one (--only) and add to the same report, docs/measured/edge.md and .png.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "backends")]

from edge import parts, report  # noqa: E402  (the package of this name, not this file)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(parts.PARTS), action="append", help="this part alone (repeatable)")
    parser.add_argument("--quick", action="store_true", help="the 1B shape instead of the 7B one")
    parser.add_argument("--scratch", type=Path, default=Path("/var/tmp/hetero-attn-edge"), help="a folder on the disk to measure")
    parser.add_argument("--write", metavar="STEM", nargs="?", const="edge", help="add to docs/measured/STEM.json, .md and .png")
    return parser.parse_args()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    asked, started = arguments(), time.perf_counter()
    asked.scratch.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", file=sys.stderr, flush=True)

    stem = ROOT / "docs" / "measured" / (asked.write or "edge")
    known = stem.with_suffix(".json")
    results = {}
    for name in asked.only or parts.PARTS:
        made = parts.PARTS[name](asked.scratch, asked.quick, say) | {"machine": parts.machine()}
        results = (json.loads(known.read_text()) if asked.write and known.exists() else results) | {name: made}
        if asked.write:                              # after each part: they take minutes, and a later one may fail
            known.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(json.dumps(results))
    text = report.markdown(results, f"{stem.name}.png" if asked.write else None)
    if asked.write:
        report.draw(stem.with_suffix(".png"), results)
        stem.with_suffix(".md").write_text(text)
    print(text)
    return 0 if all(passed for _, passed in report.verdicts(results)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
