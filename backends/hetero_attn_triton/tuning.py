"""Which tile is quickest on this device, measured once and kept: python -m hetero_attn_triton.tuning [--dims 64,128] [--show] [--forget]

Nothing is ever tuned behind a call's back: until this command has run, tiles are those that tiling.py plans, and a call only looks into
what was kept (tuned_tiles.py). Classes of calls are tiling.shape_class's.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable

import torch

from hetero_attn.artifacts import CacheError
from hetero_attn.spec import AttentionSpec, Operands
from hetero_attn_triton import calls, tiling
from hetero_attn_triton.tiling import Tile
from hetero_attn_triton.tuned_tiles import load_tuned, save_tuned, tuned_path

NO_DEVICE = 3                                        # exit code
WARM_UP, ROUNDS = 3, 20


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
