"""Numbers with a unit as people write them on a command line or in a profile: 3GiB, 500 MB, 300Mbit/s, 1 ms."""

from __future__ import annotations

import math
import re

BYTES = {"": 1, "B": 1, **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)},
         **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}}
SIZE_PATTERN = r"[0-9]+(\.[0-9]+)? ?([kMGT]?B|[KMGT]iB)"
SIZE_FORM = "a number and a unit, as in 3GiB or 800MB"


def parse_bytes(text: str) -> int:
    """'3GiB', '1.5 GB', '800MB' -> bytes. Raises ValueError: a number alone is refused, since it could be anything."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): factor for unit, factor in BYTES.items()}
    if not found or not found[2] or found[2].lower() not in units or not math.isfinite(float(found[1])):
        raise ValueError(f"{text!r} is no size, expected {SIZE_FORM} (units: {', '.join(unit for unit in BYTES if unit)})")
    return int(float(found[1]) * units[found[2].lower()])


def shown_bytes(count: float) -> str:
    """Bytes in the binary unit that suits them: 512 B, 231 MiB, 1.24 GiB."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= factor:
            value = count / factor
            return f"{value:.2f} {unit}" if unit == "GiB" else f"{value:.0f} {unit}"
    return f"{count:.0f} B"


def shown_seconds(seconds: float) -> str:
    """Seconds in the unit that suits them: 12.3 s, 4.56 ms, 7.8 us."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= factor or unit == "us":
            return f"{seconds / factor:.3g} {unit}"
    raise AssertionError("unreachable")
