"""The run as markdown (printed, and written with the plots under --write) and as JSON. Every figure stands beside its peer of the run."""

from __future__ import annotations

from dataclasses import asdict

from cpu.machine import headline
from cpu.verdicts import Verdict

from collectives import bars
from collectives.bars import duration, error, size
from collectives.emulated import RATE_MBIT, ROW, SIZES
from collectives.payload import DELAY_MS, HIDDEN, TOKENS
from hetero_attn.collectives.tuning import CALIBRATED


def all_verdicts(results: dict) -> list[Verdict]:
    """The required lines of whichever parts were run."""
    return [line for part in results.values() for line in part.verdicts()]


def markdown(facts: dict, results: dict, skipped: dict[str, str], plots: dict[str, str]) -> str:
    """The whole report. skipped: part -> why it was not run; plots: part -> file name beside it."""
    parts = ["# Collectives, measured", "", headline(facts), "",
             "Contenders take turns in every round; medians of rounds, the slowest rank's; ranks run under SCHED_BATCH, gloo's too "
             "(OpenMPI's run by themselves, under the normal policy).", ""]
    for part, section in (("one_host", _one_host), ("stress", _stress), ("emulated", _emulated), ("payload", _payload),
                          ("accuracy", _accuracy)):
        if part in results:
            parts += section(results[part])
            if part in plots:
                parts += [f"![{part}]({plots[part]})", ""]
        elif part in skipped:
            parts += [f"## Not run: {part}", "", skipped[part], ""]
    lines = all_verdicts(results)
    parts += [f"## Required: {sum(line.passed for line in lines)} of {len(lines)} hold", "", "```", *map(str, lines), "```", ""]
    return "\n".join(parts)


def as_json(facts: dict, results: dict, skipped: dict[str, str]) -> dict:
    """Everything that was measured, in seconds, bytes and bits, and the verdicts."""
    return {"machine": facts, **{name: asdict(part) for name, part in results.items()}, "skipped": skipped,
            "verdicts": [asdict(line) for line in all_verdicts(results)]}


def _one_host(found) -> list[str]:
    lines = ["## One host: shared memory", "", f"all_reduce of fp32 from Python. Published: {bars.OPENMPI_WHERE}."]
    lines += [f"OpenMPI was not run here: {found.openmpi_reason}." if found.openmpi_reason else
              "OpenMPI beside it: mpi4py's Allreduce in place, its own ranks, in this run.", "",
              "| ranks | size | ours | ours, in place | gloo | OpenMPI here | OpenMPI published | over gloo |", "|---:|---|" + "---:|" * 6]
    for ranks, sizes in found.plain.items():
        for nbytes, times in sizes.items():
            low, high = bars.OPENMPI_S[ranks][nbytes]
            published = duration(low) if low == high else f"{duration(low)} to {duration(high)}"
            here = found.openmpi.get(ranks, {}).get(nbytes)
            ours, inside, gloos = (times[name] for name in ("ours", "ours, in place", "gloo"))
            lines.append(f"| {ranks} | {size(nbytes)} | **{duration(ours)}** | {duration(inside)} | {duration(gloos)} | "
                         f"{duration(here) if here else '-'} | {published} | {gloos / ours:.1f}x |")
    lines += ["", "Fused all-reduce + residual + RMSNorm, hidden 4096, fp32, 2 ranks, against gloo's all_reduce + add + torch's rms_norm.",
              "An x that nobody writes between two calls stays in the caches where it is summed; `written anew` copies one in first, and "
              "the copy counts.",
              "", "| tokens | fused, x in shared memory | x written anew | private x | gloo + add + norm | times | anew | required |",
              "|---:|" + "---:|" * 7]
    for tokens, times in found.fused.items():
        fused, anew, private, gloos = (times[name] for name in ("fused", "fused, x written anew", "fused, private x", "gloo"))
        lines.append(f"| {tokens} | **{duration(fused)}** | {duration(anew)} | {duration(private)} | {duration(gloos)} | "
                     f"{gloos / fused:.1f}x | {gloos / anew:.1f}x | {bars.FUSED_TIMES[tokens]:g}x |")
    return [*lines, ""]


def _stress(found) -> list[str]:
    lines = ["## Stress", "", "all_reduce, fused norm, reduce_scatter, all_gather, broadcast, barrier; order, shapes and dtypes drawn.", ""]
    return [*lines, *(f"- {ranks} ranks: {calls} calls in {seconds:.0f} s, {alike} with the same bits on all ranks"
                      for ranks, (calls, alike, seconds) in found.runs.items()), ""]


def _emulated(found) -> list[str]:
    lines = [f"## Emulated links of {RATE_MBIT:g} Mbit/s", "",
             f"One row of {ROW} fp32, ms. `auto` is what a start-up's measurement chose.", "",
             "| ranks | one way | gloo | auto | chosen | times | " + " | ".join(found.rows[0].algorithms) + " |",
             "|---:|---:|---:|---:|---|---:|" + "---:|" * len(found.rows[0].algorithms)]
    for row in found.rows:
        cells = [f"{row.delay_ms:g} ms", _ms(row.gloo), f"**{_ms(row.auto)}**", row.route, f"{row.gloo / row.auto:.1f}x"]
        lines.append(f"| {row.ranks} | " + " | ".join([*cells, *map(_ms, row.algorithms.values())]) + " |")
    calibrated = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in CALIBRATED)
    lines += ["", "The model beside the clock: ms measured / predicted (off by). Fitted for each line's links to pings, streams and "
              f"{calibrated}; none of the points below is among them.", "",
              "| ranks, one way | algorithm | " + " | ".join(map(size, SIZES)) + " |", "|---|---|" + "---:|" * len(SIZES)]
    cells: dict[tuple[str, str], list[str]] = {}
    for point in found.points:
        cells.setdefault((f"{point.ranks}, {point.delay_ms:g} ms", point.algorithm), []).append(
            f"{_ms(point.measured)} / {_ms(point.predicted)} ({error(point.measured, point.predicted):+.0%})")
    lines += [f"| {where} | {algorithm} | " + " | ".join(each) + " |" for (where, algorithm), each in cells.items()]
    numbers = [f"- {where}: " + ", ".join(f"{name} {value:g}" for name, value in link.items()) for where, link in found.links.items()]
    return [*lines, "", "What the fits found:", "", *numbers, ""]


def _payload(found) -> list[str]:
    lines = [f"## A prefill's sum over {RATE_MBIT:g} Mbit/s, {DELAY_MS:g} ms: {TOKENS} x {HIDDEN} bf16", "",
             "Bits a value: bytes handed to torch.distributed with our headers (at the interface: TCP's headers and acknowledgements too). "
             "Times are over our best bf16 algorithm. The error is relative to the sum's root mean square.", "",
             "| ranks | algorithm | codec | ms | times | bits a value | at the interface | error |", "|---:|---|---|" + "---:|" * 5]
    for each in found.ways:
        best = found.best_plain(each.ranks)
        lines.append(f"| {each.ranks} | {each.algorithm} | {each.codec} | {_ms(each.seconds)} | {best.seconds / each.seconds:.2f}x | "
                     f"{'-' if each.bits is None else f'{each.bits:.3f}'} | {each.interface_bits:.2f} | {each.error:.2%} |")
    picks = [f"- `codec: auto` picks {route} for it at {ranks} ranks, without a calibration" for ranks, route in found.auto.items()]
    return [*lines, "", *picks, ""]


def _accuracy(found) -> list[str]:
    import codec_accuracy

    text = codec_accuracy.markdown({"date": "", "machine": "", "runs": found.runs, "stress": found.stress})
    return ["## Accuracy: examples/tiny-llama through real tensor parallelism", "", *text.splitlines()[2:], ""]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"
