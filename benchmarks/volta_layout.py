"""What the Volta kernels' shared-memory layout is worth, counted: make bench-volta-layout, or python benchmarks/volta_layout.py --help.

The same kernel with three layouts (rows unpadded; padded; padded with renumbered keys: ours) is run by csrc/simt's executor, which counts
bank conflicts as the hardware would have them. One more tile of keys is what a row of the table costs. From the same counts comes a
roofline estimate a shape for a V100: an estimate, since nobody ran it on one; it knows no latencies. Exit code 1: ours has a conflict.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]

from hetero_attn_volta import VoltaBackend  # noqa: E402
from hetero_attn_volta.tiling import FORWARD, Plan, Variant, plan  # noqa: E402

from hetero_attn import attention, registry  # noqa: E402
from hetero_attn.jit import csrc_dir  # noqa: E402
from hetero_attn.profile import load_profile  # noqa: E402
from hetero_attn.spec import AttentionSpec  # noqa: E402
from hetero_attn.testing.simt import Counts, SimtLauncher, Traffic  # noqa: E402
from hetero_attn.testing.tolerances import mismatch  # noqa: E402

# A clock and multiprocessor; NVIDIA V100 whitepaper. SPECIAL: exponentials and conversions to half, 4 in each of 4 quarters.
TENSOR_FMA, SPECIAL = 512, 16
FMA_OF_MMA = 16 * 16 * 4                               # of a warp's m8n8k4: four quad pairs
ACCESSES = (("K loads", "K", "load"), ("V loads", "V", "load"), ("P stores", "P", "store"), ("P loads", "P", "load"),
            ("K stores", "K", "store"), ("V stores", "V", "store"))
# Shapes of the estimate: batch, query heads, KV heads, query length, key length, head dimension; all causal.
SHAPES = ((1, 32, 32, 2048, 2048, 64), (1, 32, 8, 4096, 4096, 128), (4, 32, 8, 1024, 1024, 128), (1, 32, 8, 16384, 16384, 128))

# A layout is a change of csrc/volta: file -> (what stands there, what takes its place).
KEYS_IN_ORDER = {
    "fragments.cuh": [("2 * bit(step, 1) + 4 * bit(lane, 1) + 8 * bit(step, 2) + 16 * bit(step, 0) + 32 * (step >> 3);",
                       "2 * bit(lane, 1) + 4 * step;")],
    "attend.cuh": [("        store_pair(tile + sum_row(lane, v1) * Memory::WEIGHT_ROW + weight_position(lane, t), first, second);",
                    "        unsigned short* to = tile + sum_row(lane, v1) * Memory::WEIGHT_ROW + 16 * t;\n"
                    "        *reinterpret_cast<unsigned*>(to + sum_column(lane, 0)) = first;\n"
                    "        *reinterpret_cast<unsigned*>(to + sum_column(lane, 4)) = second;")],
}
UNPADDED = {"fragments.cuh": [("constexpr int PAD = 4;", "constexpr int PAD = 0;")]}
BARRIER_FOR_P = {"attend.cuh": [("      if (ONE_BUFFER) meet();\n      put(staged, memory.values",
                                 "      meet();\n      put(staged, memory.values")]}


@dataclass(frozen=True)
class Layout:
    """A way to lay out the tiles. pad: halves between rows; changes: of csrc/volta."""

    name: str
    what: str
    pad: int
    changes: tuple[dict, ...]


LAYOUTS = (
    Layout("naive", "rows unpadded, keys in their own order, weights handed over behind a barrier of the block", 0,
           (KEYS_IN_ORDER, UNPADDED, BARRIER_FOR_P)),
    Layout("padded", "rows padded by 4 halves, keys in their own order", 4, (KEYS_IN_ORDER,)),
    Layout("ours", "padded, keys renumbered (csrc/volta/fragments.cuh)", 4, ()),
)


def copy_with(layout: Layout, folder: Path) -> Path:
    """csrc/volta with a layout's changes, under `folder`. Raises ValueError where the sources no longer hold what is to be changed."""
    shutil.copytree(csrc_dir() / "volta", folder / "volta")
    for change in layout.changes:
        for file, replacements in change.items():
            path = folder / "volta" / file
            text = path.read_text()
            for old, new in replacements:
                if text.count(old) != 1:
                    raise ValueError(f"layout {layout.name}: {file} holds {text.count(old)} times what it should hold once: {old!r}")
                text = text.replace(old, new)
            path.write_text(text)
    return folder


def regions_of(variant: Variant, pad: int) -> dict[str, tuple[int, int]]:
    """K, V and P of a forward block in bytes, as Variant.regions has them for our padding. Where one tile serves both, it is K's."""
    tile, weights = 2 * variant.keys * (variant.head_dim + pad), 2 * 16 * (variant.keys + pad) * variant.row_tiles * variant.warps
    values = 0 if variant.one_buffer else tile
    regions = {"K": (0, tile), "V": (values, values + tile), "P": (values + tile, values + tile + weights)}
    return {name: region for name, region in regions.items() if name != "V" or not variant.one_buffer}


def one_more_tile(variant: Variant, launcher: SimtLauncher) -> tuple[Counts, Counts, str | None]:
    """Counts of a block at three and at four tiles of keys; and how its output differs from the definition, if it does."""
    counts, wrong = [], None
    backend = VoltaBackend(launcher)
    backend.plan = lambda spec: Plan(variant, (ceil(spec.q_len / variant.queries), spec.q_heads, spec.batch), 1)
    with registry.register("volta-layout", lambda: backend):
        for tiles in (3, 4):
            random = torch.Generator().manual_seed(tiles)
            q, k, v = (torch.randn(1, 1, length, variant.head_dim, generator=random, dtype=torch.float32).half()
                       for length in (variant.queries, tiles * variant.keys, tiles * variant.keys))
            out = attention(q, k, v, backend="volta-layout")
            wrong = wrong or mismatch(out, attention(q.double(), k.double(), v.double(), backend="reference"), torch.float16)
            counts.append(launcher.launched[-1][1])
    return *counts, wrong


def measure(variant: Variant, layout: Layout, folder: Path) -> dict:
    """A row of the table: conflicts of one tile by access, wavefronts, barriers, bytes. Raises RuntimeError if the output is wrong."""
    launcher = SimtLauncher(counted=True, root=copy_with(layout, folder))
    launcher.regions = regions_of(variant, layout.pad)
    few, more, wrong = one_more_tile(variant, launcher)
    if wrong:
        raise RuntimeError(f"layout {layout.name}, {variant.name}: {wrong}")
    none = Traffic()
    traffic = {name: more.regions.get((region, way), none) - few.regions.get((region, way), none) for name, region, way in ACCESSES}
    return {
        "variant": variant.name, "layout": layout.name, "conflicts": {name: each.conflicts for name, each in traffic.items()},
        "requests": {name: each.requests for name, each in traffic.items()},
        "wavefronts": sum(each.wavefronts for each in traffic.values()),
        "all_wavefronts": sum((more.total("shared", way) - few.total("shared", way)).wavefronts for way in ("load", "store")),
        "ideal_wavefronts": sum(each.ideal_wavefronts for each in traffic.values()),
        "barriers": more.instructions["barrier"] - few.instructions["barrier"],
        "shared_bytes": max(regions_of(variant, layout.pad).values())[1],
        "mma": more.instructions["mma"] - few.instructions["mma"], "special": more.instructions["special"] - few.instructions["special"],
        "sectors": (more.total("global", "load") - few.total("global", "load")).sectors,
    }


def tiles_visited(shape: tuple[int, ...], variant: Variant) -> int:
    """Tiles of keys that the blocks of one head go through in a causal prefill."""
    _, _, _, q_len, kv_len, _ = shape
    ends = (min(kv_len, min(first + variant.queries, q_len) + kv_len - q_len) for first in range(0, q_len, variant.queries))
    return sum(ceil(max(end, 0) / variant.keys) for end in ends)


def estimate(shape: tuple[int, ...], row: dict, variant: Variant) -> dict:
    """The least time of a causal prefill on a V100 by the counts of one tile, in ms, by what bounds it."""
    B, Hq, Hkv, q_len, kv_len, D = shape
    hardware = load_profile("v100").hardware
    tiles, rate = B * Hq * tiles_visited(shape, variant), hardware.units * hardware.clock_ghz * 1e9
    parts = {"tensor cores": tiles * row["mma"] * FMA_OF_MMA / TENSOR_FMA / rate, "shared memory": tiles * row["all_wavefronts"] / rate,
             "exponentials and conversions": tiles * row["special"] / SPECIAL / rate,
             "memory (once)": 2 * B * D * (2 * Hq * q_len + 2 * Hkv * kv_len) / (hardware.memory_gbps * 1e9)}
    bound = max(parts, key=parts.get)
    seen = B * Hq * sum(min(kv_len, i + 1 + kv_len - q_len) for i in range(q_len))
    return {"shape": list(shape), "variant": variant.name, "ms": {name: 1e3 * s for name, s in parts.items()}, "bound": bound,
            "tflops_at_most": 4 * seen * D / parts[bound] / 1e12, "loaded_sectors_gb": tiles * row["sectors"] * 32 / 1e9}


def markdown(rows: list[dict], estimates: list[dict]) -> str:
    names = [name for name, _, _ in ACCESSES]
    titles = ["variant", "layout", *names, "wavefronts (ideal)", "tile memory, B", "barriers"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lines += [f"| {r['variant']} | {r['layout']} | " + " | ".join(str(r["conflicts"][name]) for name in names) +
              f" | {r['wavefronts']} ({r['ideal_wavefronts']}) | {r['shared_bytes']} | {r['barriers']} |" for r in rows]
    lines += ["", *(f"{layout.name}: {layout.what}." for layout in LAYOUTS),
              "Tile memory: K, V and the weights P. Where one tile serves K and V in turn (forward-d128-q256-k32), its accesses are under",
              "K; there Q is read from shared memory too, which the estimate knows and the wavefronts here leave out.", "",
              "Estimate, not a measurement: least time of a causal fp16 prefill on a V100 by these counts; latencies, issue slots and",
              "the scalar instructions of the softmax are not in it.", "",
              "| B, Hq, Hkv, Sq, Skv, D | layout | bound by | ms at least | TFLOP/s at most |", "|---" * 5 + "|"]
    for each in estimates:
        shape, least = ", ".join(map(str, each["shape"])), max(each["ms"].values())
        lines.append(f"| {shape} | {each['layout']} | {each['bound']} | {least:.2f} | {each['tflops_at_most']:.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128], choices=sorted({v.head_dim for v in FORWARD}))
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--write", action="store_true", help="also write docs/measured/volta_layout.md and .json")
    arguments = parser.parse_args()
    rows, estimates = [], []
    for variant in (v for v in FORWARD if v.head_dim in arguments.head_dim):
        for layout in LAYOUTS:
            print(f"{variant.name}: {layout.name} ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="volta-layout-") as folder:
                rows.append(measure(variant, layout, Path(folder) / "csrc"))
    hardware = load_profile("v100").hardware
    for shape in SHAPES:
        B, Hq, Hkv, q_len, kv_len, D = shape
        spec = AttentionSpec("cuda", torch.float16, B, Hq, Hkv, q_len, kv_len, D, D, is_causal=True)
        chosen = plan(spec, hardware).variant
        estimates += [estimate(shape, row, chosen) | {"layout": row["layout"]} for row in rows if row["variant"] == chosen.name]
    where = f"counted by csrc/simt on {platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; no V100 took part"
    text = markdown(rows, estimates)
    if arguments.json:
        print(json.dumps({"where": where, "tiles": rows, "estimates": estimates}, indent=1))
    else:
        print(f"Bank conflicts of one tile of keys of a block, by access; {where}\n\n{text}")
    if arguments.write:
        stem = ROOT / "docs" / "measured" / "volta_layout"
        head = f"# Bank conflicts of the Volta kernels, by layout\n\n`make bench-volta-layout`, {where}.\n\n"
        stem.with_suffix(".md").write_text(f"{head}{text}\n")
        stem.with_suffix(".json").write_text(json.dumps({"where": where, "tiles": rows, "estimates": estimates}, indent=1) + "\n")
    ours = [row for row in rows if row["layout"] == "ours"]
    return int(any(sum(row["conflicts"].values()) for row in ours))


if __name__ == "__main__":
    sys.exit(main())
