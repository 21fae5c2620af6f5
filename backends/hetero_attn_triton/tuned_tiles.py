"""The tiles that were measured on a device, kept in a file: triton-tiles/ in the project's cache folder.

A file is named by the device and by a digest of the kernels and of the rules that plan them, so that a changed kernel is measured anew. It
is written in one step and read once a process; a file that cannot be read is warned about, and the planned tiles serve.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from functools import cache
from pathlib import Path

from hetero_attn.artifacts import CacheError, cache_folder
from hetero_attn_triton import tiling
from hetero_attn_triton.tiling import Tile

KERNELS = ("attention_kernel.py", "combine_kernel.py", "tiling.py")
FORMAT = 1


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
