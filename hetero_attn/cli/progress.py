"""How much of the weights is loaded: a bar on a terminal (or with --progress), one plain line at the end elsewhere.

All of it goes to stderr: stdout belongs to the generated text.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH, EVERY_S = 30, 0.1
UNITS = ("B", "kB", "MB", "GB", "TB")


def size(count: float) -> str:
    """A number of bytes as people read it: 512 B, 8.1 MB, 140 GB."""
    for unit in UNITS:
        if count < 999.5 or unit == UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


class ByteProgress:
    """A load_model progress callback: (done_bytes, total_bytes)."""

    def __init__(self, label: str, *, bar: bool | None = None, stream: TextIO | None = None):
        """bar None: on a terminal only."""
        self._label, self._stream = label, stream or sys.stderr
        self._bar = self._stream.isatty() if bar is None else bar
        self._started, self._shown, self._ended = time.perf_counter(), 0.0, False

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self._ended:
            return
        self._ended = done >= total
        seconds = now - self._started
        if self._bar and (self._ended or now - self._shown >= EVERY_S):
            self._shown = now
            share = done / total if total else 1.0
            filled = int(share * WIDTH)
            rate = f"{size(done / seconds)}/s" if seconds else ""
            line = f"\r{self._label} [{'#' * filled}{'.' * (WIDTH - filled)}] {share:4.0%} {size(done)} of {size(total)} {rate}"
            self._stream.write(line + ("\x1b[K" if self._stream.isatty() else "") + ("\n" if self._ended else ""))
        elif not self._bar and self._ended:
            self._stream.write(f"{self._label}: {size(total)} in {seconds:.1f} s\n")
        self._stream.flush()
