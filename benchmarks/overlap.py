"""Schedules side by side: make bench-overlap, or python benchmarks/overlap.py --help.

A random model of Llama's shape runs prompts on two ranks that share memory, or are joined by a link of 1 Gbit/s or 300 Mbit/s (network
namespaces: root), by each schedule in turns; and one row-parallel linear in tiles. The table goes to stdout, progress to stderr. --grid
is the report's own grid (half an hour). --keep FILE keeps every finished cell, so that it can be run piece by piece; --write puts markdown,
plots and JSON into docs/measured.
Exit code: 0; 1 a required line fails; 2 wrong arguments; 3 no links here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "backends")]

from cpu import machine  # noqa: E402
from links import LinksError, links, unavailable  # noqa: E402
from overlap import cell, grid, linear, plots, report  # noqa: E402
from overlap.model import Shape  # noqa: E402

from hetero_attn.parallel.launch import run_ranks  # noqa: E402

# Mbit/s and the largest packet in bytes. At 1 Gbit/s packets are as long as a network card's offload lets a host's be: with short ones the
# emulated link would take half of this machine's processors for what a card does itself.
LINKS = {report.SHARED: None, "1 Gbit/s": (1000.0, 32000), "300 Mbit/s": (300.0, 9000)}
ALL = (cell.NO_COMM, *report.FIXED, "auto")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", action="store_true", help="the report's cells and linears (on --links), whatever else is said of them")
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--contenders", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of each cell (default: 5)")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=0, help="a mixture of so many experts, two for each token")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    mixed = f"also a batch of {grid.MIXED[0]} decoding sequences and a prompt of {grid.MIXED[2]}"
    parser.add_argument("--mixed", action="store_true", help=mixed)
    parser.add_argument("--tiled", type=int, nargs="*", metavar="ROWS", help="one row-parallel linear of so many rows, in tiles")
    parser.add_argument("--trace", action="store_true", help="keep a trace of one step by `auto` of each cell, for the picture")
    parser.add_argument("--keep", metavar="FILE", type=Path, help="add to the results in FILE; what is there already is not measured again")
    parser.add_argument("--report-only", action="store_true", help="measure nothing, report what FILE holds")
    parser.add_argument("--write", metavar="STEM", nargs="?", const="overlap", help="write docs/measured/STEM.md, STEM.json and plots")
    parsed = parser.parse_args()
    if parsed.rounds < 1 or min([1, *parsed.tokens, *(parsed.tiled or [])]) < 1:
        parser.error("--rounds, --tokens and --tiled take numbers of at least 1")
    if not {cell.NO_COMM, "plain"} <= set(parsed.contenders) or not set(report.WEAVES) & set(parsed.contenders):
        parser.error(f"--contenders needs {cell.NO_COMM!r}, 'plain' and a weave: everything is compared with them")
    return parsed


def on_link(link: str, fn: Any, args: tuple) -> Any:
    """fn(*args) on two ranks joined by the link: rank 0's result."""
    if LINKS[link] is None:
        return run_ranks(fn, args, 2, threads=1)[0]
    rate, mtu = LINKS[link]
    with links(2, rate, 0, mtu=mtu, via="netem") as network:     # the rate alone, by the kernel's tc tbf
        return network.run(fn, args, timeout_s=3600)[0]


def main() -> int:
    asked = arguments()
    if any(LINKS[link] for link in asked.links) and not asked.report_only and (reason := unavailable()):
        print(f"overlap: only {report.SHARED} can be had here: {reason}", file=sys.stderr)
        return 3
    started = time.perf_counter()

    def progress(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {text}", file=sys.stderr, flush=True)

    results = json.loads(asked.keep.read_text()) if asked.keep and asked.keep.exists() else {"cells": [], "tiled": [], "machine": {}}
    if not asked.report_only:
        results["machine"] = machine.describe("cpu", 1)
        try:
            measure(asked, results, progress)
        except LinksError as error:
            print(f"overlap: {error}", file=sys.stderr)
            return 3
    cells = [as_cell(each) for each in results["cells"]]
    lines = report.verdicts(cells, results["tiled"])
    title = machine.headline(results["machine"])
    files: list[str] = []
    if asked.write:
        stem = ROOT / "docs" / "measured" / asked.write
        files = plots.draw(stem, title.partition(";")[0], cells, results["cells"])
        stem.with_name(f"{asked.write}.json").write_text(json.dumps(without_traces(results), indent=1) + "\n")
    text = report.markdown(title, cells, lines, results["tiled"], files)
    if asked.write:
        stem.with_name(f"{asked.write}.md").write_text(text)
    print(text)
    return 0 if all(line.passed for line in lines) else 1


def measure(asked: argparse.Namespace, results: dict[str, Any], progress) -> None:
    """Fill in what is asked for and not there yet; every cell is kept as soon as it is measured."""
    shape = Shape(hidden=asked.hidden, ffn=asked.ffn, layers=asked.layers, experts=asked.experts, dtype=asked.dtype)
    tokens = [*asked.tokens, *([0] if asked.mixed else [])]
    cells = grid.GRID if asked.grid else [grid.Cell(link, shape, each) for link in asked.links for each in tokens]
    for each in cells:
        known = {(other["link"], other["label"], tuple(other["counts"])) for other in results["cells"]}
        if each.link not in asked.links or (each.link, each.label, tuple(each.counts)) in known:
            continue
        progress(f"{each.link}, {each.label}, {each.counts} tokens")
        prompts, mixed = ((each.tokens,), ()) if each.tokens else ((), (grid.MIXED,))
        contenders = tuple(name for name in ALL if name in asked.contenders)
        found = on_link(each.link, cell.measure, (cell.Job(each.shape, prompts, asked.rounds, contenders, mixed, asked.trace),))
        facts = {name: value for name, value in found.items() if name != "cells"}
        for own in found["cells"]:
            traced = {"spent": report.spent(own["trace"])} if "trace" in own else {}
            results["cells"].append({"link": each.link, "label": each.label, "date": now(), **facts, **own, **traced})
        keep(asked, results)
    rows = grid.LINEAR_ROWS if asked.grid else tuple(asked.tiled or ())
    for link in asked.links if rows else ():
        missing = tuple(count for count in rows if (link, count) not in {(other["link"], other["rows"]) for other in results["tiled"]})
        if missing and not (asked.grid and link == report.SHARED):
            progress(f"{link}, one linear of {missing} rows")
            found = on_link(link, linear.measure, (asked.ffn, asked.hidden, missing, asked.rounds))
            results["tiled"] += [{"link": link, "date": now(), **own} for own in found]
            keep(asked, results)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def keep(asked: argparse.Namespace, results: dict[str, Any]) -> None:
    if asked.keep:
        part = asked.keep.with_suffix(".part")
        part.write_text(json.dumps(results))
        part.replace(asked.keep)


def as_cell(each: dict[str, Any]) -> report.Cell:
    label = each["label"] + (f" ({each['remark']})" if "remark" in each else "")
    return report.Cell(each["link"], label, tuple(each["counts"]), each["cuts"], each["seconds"], each["simulated"],
                       each.get("busy", 0.0), each.get("spent", {}))


def without_traces(results: dict[str, Any]) -> dict[str, Any]:
    cells = [{name: value for name, value in each.items() if name != "trace"} for each in results["cells"]]
    return {**results, "cells": cells}


if __name__ == "__main__":
    raise SystemExit(main())
