"""Which tile is quickest on this device, measured once and kept: python -m hetero_attn_triton.tuning [--dims 64,128] [--show] [--forget]

Nothing is ever tuned behind a call's back: until this command has run, tiles are those that tiling.py plans, and a call only looks into
a file that is read once a process. The file lies in the project's cache folder under triton-tiles/, named by the device and by a digest of
the kernels, so that a changed kernel is measured anew; it is written in one step. Classes of calls are tiling.shape_class's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import torch

from hetero_attn.artifacts import CacheError, cache_folder
from hetero_attn.spec import AttentionSpec, Operands
from hetero_attn_triton import tiling
from hetero_attn_triton.tiling import Tile

KERNELS = ("attention_kernel.py", "combine_kernel.py", "tiling.py")
FORMAT = 1
NO_DEVICE = 3                                        # exit code
WARM_UP, ROUNDS = 3, 20


@cache
def digest() -> str:
    """Of what a measurement is of: the kernels and the rules by which they are planned."""
    total = hashlib.sha256()
    for name in KERNELS:
        total.update((Path(__file__).parent / name).read_bytes())
    return total.hexdigest()[:12]


def tuned_path(device_name: str) -> Path:
    """The file for a device's name, such as 'NVIDIA H100 80GB HBM3'. Raises CacheError where there is no folder to keep it in."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") or "device"
    return cache_folder() / "triton-tiles" / f"{slug}-{digest()}.json"


def load_tuned(device_name: str) -> dict[str, Tile]:
    """shape_class -> tile; {} where nothing was measured. A file that cannot be read is warned about, and planned tiles serve."""
    try:
        path = tuned_path(device_name)
        found = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise ValueError(f"format is {found['format']}, expected {FORMAT}")
        return {name: _tile(entry) for name, entry in found["tiles"].items()}
    except (FileNotFoundError, CacheError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"tuned tiles in {path} are not used: {error}; delete the file, or run python -m hetero_attn_triton.tuning",
                      stacklevel=2)
        return {}


def _tile(entry: dict) -> Tile:
    numbers = [entry[name] for name in ("rows", "keys", "warps", "stages")]
    powers = all(type(number) is int and number >= 0 and number & (number - 1) == 0 for number in numbers[:3])
    if not powers or numbers[1] < tiling.LEAST or not 1 <= numbers[2] <= 16 or type(numbers[3]) is not int or not 1 <= numbers[3] <= 8:
        raise ValueError(f"a tile is {entry}, expected powers of 2 for rows, keys (from 16) and warps (1 to 16), and 1 to 8 stages")
    return Tile(*numbers)


def save_tuned(device_name: str, tiles: dict[str, Tile], microseconds: dict[str, float]) -> Path:
    """Add to what is kept for the device, in one step: a reader sees the file before or after. Of two writers the last one's classes stay.

    Raises CacheError where the folder cannot be written."""
    path = tuned_path(device_name)
    merged = load_tuned(device_name) | tiles
    times = _times(path) | microseconds
    entries = {name: {"rows": tile.rows, "keys": tile.keys, "warps": tile.warps, "stages": tile.stages,
                      **({"microseconds": round(times[name], 2)} if name in times else {})} for name, tile in sorted(merged.items())}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"format": FORMAT, "device": device_name, "kernels": digest(), "tiles": entries}, file, indent=1)
                file.write("\n")
            os.chmod(draft, 0o666 & ~_umask())       # mkstemp's 0600 would keep it from those who share the folder
            os.replace(draft, path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
    except OSError as error:
        remedy = "set HETERO_ATTN_CACHE_DIR to a folder of yours"
        raise CacheError(f"tuned tiles cannot be kept in {path.parent}: {error.strerror}; {remedy}") from None
    return path


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _times(path: Path) -> dict[str, float]:
    try:
        return {name: entry["microseconds"] for name, entry in json.loads(path.read_text())["tiles"].items() if "microseconds" in entry}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def quickest(tiles: Iterable[Tile], time_of: Callable[[Tile], float]) -> tuple[Tile, dict[Tile, float | str]]:
    """The tile whose time is least, and every tile's time, or its error's first line where it did not run. Raises RuntimeError where
    none ran."""
    found: dict[Tile, float | str] = {}
    for tile in tiles:
        try:
            found[tile] = time_of(tile)
        except Exception as error:      # out of registers, shared memory, or a compiler's own error: the next tile may do
            found[tile] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    ran = {tile: seconds for tile, seconds in found.items() if not isinstance(seconds, str)}
    if not ran:
        raise RuntimeError(f"no tile ran: {found}")
    return min(ran, key=ran.__getitem__), found


def specs(dims: Iterable[int], dtype: torch.dtype = torch.bfloat16) -> list[AttentionSpec]:
    """What is measured: a causal prefill of 4096 tokens and a decode step over 8 sequences of 8192, GQA 32:8, for each head dimension."""
    made = []
    for dim in dims:
        for batch, q_len, kv_len in ((1, 4096, 4096), (8, 1, 8192)):
            made.append(AttentionSpec("cuda", dtype, batch, 32, 8, q_len, kv_len, dim, dim, is_causal=True, scale=1 / math.sqrt(dim)))
    return made


def measure(backend, spec: AttentionSpec, device: torch.device) -> tuple[Tile, dict[Tile, float | str]]:
    """Every candidate of a call on the device: microseconds, medians of ROUNDS after a warm-up."""
    from hetero_attn_triton import calls

    hardware = backend.launcher.hardware(device)
    shapes = ((spec.q_heads, spec.q_len), (spec.kv_heads, spec.kv_len), (spec.kv_heads, spec.kv_len))
    q, k, v = (torch.randn(spec.batch, heads, length, spec.head_dim, dtype=spec.dtype, device=device) for heads, length in shapes)
    fold = tiling.folded(spec)
    rows = spec.q_len * spec.group_size if fold else spec.q_len

    def time_of(tile: Tile) -> float:
        plan = tiling.planned(spec, hardware, tile, fold, rows)
        run = lambda: calls.attention(backend.launcher, plan, q, k, v, spec, Operands())
        for _ in range(WARM_UP):
            run()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
        for begin, end in events:
            torch.cuda._sleep(1_000_000)             # the device waits until all is enqueued: a decode step is shorter than its launch
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        return 1e3 * statistics.median(begin.elapsed_time(end) for begin, end in events)

    return quickest(tiling.candidates(spec, hardware), time_of)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hetero_attn_triton.tuning", description="Measure which tiles are quickest here.")
    parser.add_argument("--dims", default="64,128", help="head dimensions, separated by commas (default 64,128)")
    parser.add_argument("--show", action="store_true", help="only print what is kept for this device")
    parser.add_argument("--forget", action="store_true", help="delete what is kept for this device")
    parser.add_argument("--json", action="store_true", help="print the tiles as JSON")
    args = parser.parse_args(argv)
    try:
        dims = [int(each) for each in args.dims.split(",")]
        [tiling.padded(dim) for dim in dims]
    except ValueError as error:
        parser.error(f"--dims {args.dims}: {error}")
    from hetero_attn_triton import TritonBackend

    backend = TritonBackend()
    if reasons := backend.unavailable_reasons():
        print(f"tuning needs a GPU that Triton serves: {'; '.join(reasons)}", file=sys.stderr)
        return NO_DEVICE
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    try:
        if args.forget:
            tuned_path(name).unlink(missing_ok=True)
            return 0
        if not args.show:
            tiles, times = {}, {}
            for spec in specs(dims):
                print(f"{tiling.shape_class(spec)} ...", file=sys.stderr, flush=True)
                best, found = measure(backend, spec, device)
                tiles[tiling.shape_class(spec)], times[tiling.shape_class(spec)] = best, found[best]
                for tile, microseconds in found.items():
                    print(f"  {tile}: {microseconds if isinstance(microseconds, str) else f'{microseconds:.1f} us'}", file=sys.stderr)
            save_tuned(name, tiles, times)
    except CacheError as error:
        print(f"tuning: error: {error}", file=sys.stderr)
        return 2
    kept = load_tuned(name)
    if args.json:
        print(json.dumps({"device": name, "file": str(tuned_path(name)), "tiles": {each: str(tile) for each, tile in kept.items()}}))
    else:
        lines = [f"{name}: {tuned_path(name)}", *(f"  {each}: {tile}" for each, tile in kept.items())]
        print("\n".join(lines) if kept else f"{name}: nothing measured")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
