"""What two levels of tiling buy over one on Ascend chips, by the executable model: python benchmarks/ascend_model.py [--quick] [--json].

Nothing here was measured on an NPU. Sizes and rates are the profiles' (configs/ascend910*.yaml, each with its source); counts are exact for
the modelled schedule (backends/hetero_attn_ascend/schedule_model.py), times are rates x counts, and the cost of one hand-over is assumed.
Writes docs/measured/ascend_model.md, .json and .png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]

from hetero_attn_ascend.chip import Chip  # noqa: E402
from hetero_attn_ascend.planner import kernel_tiles, one_level_tiles, two_level_tiles  # noqa: E402
from hetero_attn_ascend.schedule_model import HAND_OVER_US, count, estimate  # noqa: E402
from hetero_attn_ascend.tiling import Problem  # noqa: E402

from hetero_attn.profile import load_profile  # noqa: E402
from hetero_attn.spec import AttentionSpec  # noqa: E402

OUT = ROOT / "docs" / "measured"
PROFILES = ("ascend910b", "ascend910a")
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
HEAD_DIMS = (64, 128)
HEADS = 32
SEARCHES = {"two": two_level_tiles, "one": one_level_tiles, "kernel": kernel_tiles}
BUFFERS = ("L1", "L0A", "L0B", "L0C", "UB")


def row(profile: str, length: int, head_dim: int, hand_over_us: float) -> dict:
    """One causal fp16 prefill, batch 1, 32 heads: the plan, its counts and times, and the same for one level and for our Triton kernel."""
    chip = Chip.of(load_profile(profile))
    spec = AttentionSpec("npu", torch.float16, 1, HEADS, HEADS, length, length, head_dim, head_dim, is_causal=True)
    result = {"profile": profile, "length": length, "head_dim": head_dim}
    for name, search in SEARCHES.items():
        plan = search(chip, Problem.of(spec))
        counts = count(plan)
        times = estimate(plan, counts, hand_over_us)
        over = [buffer for buffer, used in counts.peak.items() if used > getattr(chip.capacity, buffer)]
        assert not over and counts.hand_overs == plan.hand_overs(), (over, counts.hand_overs, plan.hand_overs())
        result[name] = plan.to_dict() | {
            "peak": dict(counts.peak), "global_bytes": counts.global_bytes, "cube_ms": times.cube_ms, "vector_ms": times.vector_ms,
            "l2_ms": times.l2_ms, "memory_ms": times.memory_ms, "hand_overs_ms": times.hand_overs_ms, "total_ms": times.total_ms,
        }
    return result


def report(rows: list[dict], hand_over_us: float) -> str:
    """The page, in Markdown."""
    lines = [
        "# Two-level tiling on Ascend: a model's figures", "",
        "**Model, not measurement. Verified on hardware: none.** Made by `make bench-ascend-model`: causal prefill, fp16, batch 1, "
        f"{HEADS} heads. Counts are exact for the modelled schedule; times are counts over the profiles' rates, all overlapped "
        f"but the hand-overs between Cube and Vector, each *assumed* to cost {hand_over_us:g} us (nobody has published it).", "",
        f"| profile | S | D | level 1 | level 2 | {' / '.join(BUFFERS)} used | hand-overs, one level | two levels | fewer "
        "| traffic GiB, one / two | mask S x S | tiling-mask | model ms, one / two |",
        "|" + "---|" * 13,
    ]
    for each in rows:
        two, one = each["two"], each["one"]
        used = _used(two)
        lines.append(
            f"| {each['profile']} | {each['length']} | {each['head_dim']} | {two['level_1'][0]} x {two['level_1'][1]} | "
            f"{' x '.join(map(str, two['level_2']))} | {used} | {one['hand_overs']} | {two['hand_overs']} | "
            f"{one['hand_overs'] / two['hand_overs']:.1f}x | {one['global_bytes'] / 2**30:.2f} / {two['global_bytes'] / 2**30:.2f} | "
            f"{_size(two['full_mask_bytes'])} | {_size(two['mask_bytes'])} | {one['total_ms']:.3g} / {two['total_ms']:.3g} |"
        )
    fewest = min(each["one"]["hand_overs"] / each["two"]["hand_overs"] for each in rows)
    lines += ["", f"Hand-overs fall {fewest:.1f}x at the least. What bounds the model's time (two levels):", "",
              "| profile | S | D | Cube ms | Vector ms | L2 ms | memory ms | hand-overs ms |", "|" + "---|" * 8]
    for each in rows:
        two = each["two"]
        figures = [two[name] for name in ("cube_ms", "vector_ms", "l2_ms", "memory_ms", "hand_overs_ms")]
        lines.append(f"| {each['profile']} | {each['length']} | {each['head_dim']} | "
                     + " | ".join("unknown" if figure is None else f"{figure:.3g}" for figure in figures) + " |")
    lines += ["", "What our own Triton kernel launches: powers of two, up to four level-2 tiles a block, more of a block held at once "
              "(`kernel_tiling.py`). On the 910A, where triton-ascend does not run, that leaves one level.", "",
              f"| profile | S | D | level 1 | level 2 | {' / '.join(BUFFERS)} used | hand-overs | fewer than one level | model ms |",
              "|" + "---|" * 9]
    for each in rows:
        kernel, one = each["kernel"], each["one"]
        lines.append(f"| {each['profile']} | {each['length']} | {each['head_dim']} | {kernel['level_1'][0]} x {kernel['level_1'][1]} | "
                     f"{' x '.join(map(str, kernel['level_2']))} | {_used(kernel)} | {kernel['hand_overs']} | "
                     f"{one['hand_overs'] / kernel['hand_overs']:.1f}x | {kernel['total_ms']:.3g} |")
    lines += ["", "The scores cross from Cube to Vector and the weights back through L2 (so on both chips; on the 910A, where "
              "both units share a core, a direct way through UB exists and is not modelled), which is what bounds it. "
              "`hetero-attn explain --tiling --profile ascend910b …` shows the plan of any call.", "", "![plot](ascend_model.png)"]
    return "\n".join(lines) + "\n"


def _used(plan: dict) -> str:
    return " / ".join(f"{100 * plan['peak'][buffer] / plan['capacity'][buffer]:.0f} %" for buffer in BUFFERS)


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


def plot(rows: list[dict], path: Path) -> None:
    """Hand-overs and the model's time against the length, one and two levels, a column a profile."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(each["profile"] for each in rows))
    figure, axes = plt.subplots(2, len(names), figsize=(5.5 * len(names), 7), squeeze=False)
    for column, name in enumerate(names):
        for head_dim in HEAD_DIMS:
            own = [each for each in rows if (each["profile"], each["head_dim"]) == (name, head_dim)]
            lengths = [each["length"] for each in own]
            for levels, style, words in (("one", "--", "one level"), ("kernel", ":", "our kernel"), ("two", "-", "two levels")):
                label = f"{words}, D = {head_dim}"
                color = {64: "tab:blue", 128: "tab:orange"}[head_dim]
                axes[0][column].plot(lengths, [each[levels]["hand_overs_busiest_core"] for each in own], style, color=color, label=label)
                axes[1][column].plot(lengths, [each[levels]["total_ms"] for each in own], style, color=color, label=label)
        for axis, what in zip(axes[:, column], ("hand-overs on the busiest core", "model's time, ms")):
            axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=what, title=f"{name} (model, verified: none)")
            axis.set_xscale("log", base=2)
            axis.legend()
            axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="lengths up to 4096 only, and nothing written")
    parser.add_argument("--hand-over-us", type=float, default=HAND_OVER_US, metavar="US", help="assumed cost of one hand-over (default 1)")
    parser.add_argument("--json", action="store_true", help="the rows as JSON on stdout in place of the page")
    args = parser.parse_args()
    if args.hand_over_us < 0:
        parser.error(f"--hand-over-us is {args.hand_over_us}, expected 0 or more")
    lengths = [length for length in LENGTHS if not args.quick or length <= 4096]
    rows = []
    for profile in PROFILES:
        for length in lengths:
            for head_dim in HEAD_DIMS:
                start = time.perf_counter()
                rows.append(row(profile, length, head_dim, args.hand_over_us))
                print(f"{profile} S={length} D={head_dim}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    page = report(rows, args.hand_over_us)
    print(json.dumps(rows, indent=1) if args.json else page)
    if not args.quick:
        (OUT / "ascend_model.md").write_text(page)
        (OUT / "ascend_model.json").write_text(json.dumps(rows) + "\n")
        plot(rows, OUT / "ascend_model.png")
        print(f"written: {OUT / 'ascend_model.md'}, .json and .png", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
