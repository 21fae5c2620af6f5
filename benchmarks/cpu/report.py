"""The run as markdown (printed, and written with the plots under --write) and as JSON. Every table has the limits beside the figures."""

from __future__ import annotations

import statistics
from dataclasses import asdict

from cpu import attention
from cpu.growth import causal_share
from cpu.machine import headline
from cpu.peers import LABELS
from cpu.shapes import FEATURES, SHAPES, WIDTH, ZEN3, figure
from cpu.verdicts import Verdict

PEERS = ("flex", "ort")


def all_verdicts(results: dict) -> list[Verdict]:
    """The required lines of whichever parts were run."""
    lines = [line for cell in results.get("attention", ()) for line in cell.verdicts()]
    if results.get("attention"):
        lines += attention.means(results["attention"])
    lines += [product.verdict() for product in results.get("linear", ())]
    if results.get("growth"):
        lines += [curve.verdict() for curve in results["growth"]] + [causal_share(results["growth"])]
    if results.get("model"):
        lines += results["model"].verdicts()
    return lines


def markdown(facts: dict, fma: float | None, results: dict, plots: dict[str, str]) -> str:
    """The whole report; plots: part -> file name beside it."""
    parts = ["# The CPU backend, measured", "", headline(facts), ""]
    if fma:
        parts += [f"Multiply-adds in registers: {fma / 1e9:.0f} GFLOP/s fp32 with {facts['threads']} threads. Where torch's fp32 GEMM "
                  "stays far below (its BLAS does not use the whole of AVX-512 on AMD), and where a 16-bit dtype has instructions of its "
                  "own, a figure can exceed its limit.", ""]
    for part, section in (("attention", _attention), ("linear", _linear), ("growth", _growth), ("model", _model)):
        if results.get(part):
            parts += section(results[part], fma)
            if part in plots:
                parts += [f"![{part}]({plots[part]})", ""]
    lines = all_verdicts(results)
    passed = sum(line.passed for line in lines)
    parts += [f"## Required: {passed} of {len(lines)} hold", "", "```", *[str(line) for line in lines], "```", ""]
    return "\n".join(parts)


def _attention(cells, fma: float | None) -> list[str]:
    """Speed-ups over torch SDPA, one row a cell."""
    lines = [
        "## Attention", "",
        "Times of torch SDPA in ms, and speed-ups over it in the same rounds (medians, interleaved). The limit is the longer of the "
        "visible products at the fp32 GEMM rate and of K and V at the read rate, both measured in those rounds, the latter on those "
        "very K and V (from L3 where they fit it), which all contenders share. "
        f"\"Table\" is the best peer's → the limit's figure on {ZEN3}; llama.cpp's ggml and OpenVINO are in it, and not timed here. "
        "ONNX Runtime has a pool of two threads; of spinning (within a run) and sleeping threads the faster was taken. It stores the new "
        "keys into its cache too, a part of its operation.", "",
        "| shape | dtype | SDPA ms | hetero_attn | " + " | ".join(LABELS[peer] for peer in PEERS)
        + " | limit | of the limit | of the FMA peak | table | GEMM GFLOP/s | read GB/s |",
        "|---|---|" + "---:|" * 10,
    ]
    for cell in cells:
        shape = SHAPES[cell.name]
        best, limit = figure(cell.name, cell.dtype)
        row = [f"{cell.name} {shape}", cell.dtype, _milliseconds(cell.seconds.get("sdpa")), f"**{_times(cell.speedup())}**"]
        row += [_times(cell.speedup(peer)) if peer in cell.seconds else f"none [{_footnote(cell, peer)}]" for peer in PEERS]
        ours, sdpa = cell.seconds.get("ours"), cell.seconds.get("sdpa")
        row += [_times(sdpa / cell.limit_s if sdpa else None), f"{cell.limit_s / ours:.0%}" if ours else "-",
                f"{shape.flops / ours / fma:.0%}" if ours and fma and not shape.decode else "",
                f"{best:g} → {limit:g}", f"{cell.limits.gemm / 1e9:.0f}", f"{cell.limits.read / 1e9:.0f}"]
        lines.append("| " + " | ".join(row) + " |")
    where: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for who, reason in cell.reasons.items():
            where.setdefault((LABELS[who], reason), []).append(f"{cell.name} {cell.dtype}")
    notes = [f"- {who}: {reason} ({', '.join(places)})" for (who, reason), places in where.items()]
    return [*lines, "", *(["Not timed:", "", *notes, ""] if notes else [])]


def _footnote(cell, peer: str) -> str:
    return "wrong" if cell.reasons.get(peer, "").startswith("wrong") else "unsupported"


def _linear(products, fma: float | None) -> list[str]:
    lines = [
        f"## Linear {FEATURES}×{WIDTH}", "",
        "The limit is min(GEMM rate, read rate × operations per byte of weight and input), both measured in the same rounds.", "",
        "| M | dtype | hetero_attn GFLOP/s | GB/s | torch GFLOP/s | GB/s | limit GFLOP/s | of the limit | required |",
        "|---:|---|" + "---:|" * 7,
    ]
    for product in products:
        ours, torchs, line = product.ours_s, product.torch_s, product.verdict()
        lines.append(
            f"| {product.rows} | {product.dtype} | **{product.flops(ours) / 1e9:.1f}** | {product.read_rate(ours) / 1e9:.1f} "
            f"| {product.flops(torchs) / 1e9:.1f} | {product.read_rate(torchs) / 1e9:.1f} | {product.limit / 1e9:.1f} "
            f"| {product.flops(ours) / product.limit:.0%} | {'pass' if line.passed else 'FAIL'} |")
    return [*lines, ""]


def _growth(curves, fma: float | None) -> list[str]:
    lines = ["## How cost grows", "", "Milliseconds, and the exponent fitted over the upper half of the sizes.", ""]
    for curve in curves:
        points = ", ".join(f"{size}: {_milliseconds(seconds)}" for size, seconds in zip(curve.sizes, curve.seconds))
        lines.append(f"- {curve.name}: exponent **{curve.slope:.2f}** (expected {curve.expected:g}); {points}")
    return [*lines, f"- {causal_share(curves).text}", ""]


def _model(speed, fma: float | None) -> list[str]:
    median = statistics.median
    limit = median(speed.decode_limit)
    return [
        "## End to end: a random bf16 model of Llama 3.2 1B's shape", "",
        f"512 prompt tokens, 64 new ones, one process each in turns, {len(speed.ours_decode)} runs, medians; "
        f"{speed.weight_bytes / 1e9:.2f} GB of weights, attention on `{speed.backend}`.", "",
        "| tokens/s | hetero-attn generate | transformers, sdpa | limit (weights over read rate) |", "|---|---:|---:|---:|",
        f"| prefill | {median(speed.ours_prefill):.0f} | {median(speed.transformers_prefill):.0f} | |",
        f"| decode | {median(speed.ours_decode):.1f} | {median(speed.transformers_decode):.1f} | {limit:.1f} |", "",
    ]


def as_json(facts: dict, fma: float | None, results: dict) -> dict:
    """Everything that was measured, seconds and bytes a second, and the verdicts."""
    cells = [asdict(cell) | {"limit_s": cell.limit_s, "speedup": cell.speedup()} for cell in results.get("attention", ())]
    growth = [asdict(curve) | {"slope": curve.slope} for curve in results.get("growth", ())]
    return {
        "machine": facts, "fma_flops": fma, "attention": cells,
        "linear": [asdict(product) | {"limit": product.limit} for product in results.get("linear", ())],
        "growth": growth, "model": asdict(results["model"]) if results.get("model") else None,
        "verdicts": [asdict(line) for line in all_verdicts(results)],
    }


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g}"
