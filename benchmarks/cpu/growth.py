"""How the cost of ours grows: linearly in the keys at decode; at prefill quadratically in the length, halved by causality, linearly by a
window. Each curve is fitted as time ~ size ** exponent over its upper half, where fixed costs no longer show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cpu import verdicts
from cpu.peers import contenders
from cpu.shapes import Shape, exponent
from cpu.timing import round_robin
from cpu.verdicts import Verdict

DTYPE = "bfloat16"
WINDOW = 256
DECODE = [2**power for power in range(9, 16)]           # keys, 512 to 32768
PREFILL = [2**power for power in range(8, 13)]          # queries and keys, 256 to 4096
CAUSAL_SHARE = 0.75                     # of full attention's time, at the longest: half, and the blocks on the diagonal


@dataclass
class Curve:
    """Median seconds at each size, the exponent of its upper half, and the exponent it should have, with a tolerance."""

    name: str
    sizes: list[int]
    seconds: list[float]
    expected: float
    tolerance: float

    @property
    def slope(self) -> float:
        half = len(self.sizes) // 2
        return exponent(self.sizes[half:], self.seconds[half:])

    def verdict(self) -> Verdict:
        return verdicts.growth(f"growth, {self.name}", self.slope, self.expected, self.tolerance)


def measure(backend: str, rounds: int, progress: Callable[[str], None]) -> list[Curve]:
    """Four curves, of few heads so that the longest stays within seconds."""
    families = {
        "decode over the keys": (DECODE, 1.0, 0.15, lambda size: Shape(1, 32, 8, 1, size, 128)),
        "prefill, full": (PREFILL, 2.0, 0.15, lambda size: Shape(1, 8, 8, size, size, 64)),
        "prefill, causal": (PREFILL, 2.0, 0.2, lambda size: Shape(1, 8, 8, size, size, 64, causal=True)),
        f"prefill, window of {WINDOW + 1}": (PREFILL, 1.0, 0.2, lambda size: Shape(1, 8, 8, size, size, 64, causal=True, window=WINDOW)),
    }
    curves = []
    for name, (sizes, expected, tolerance, shape) in families.items():
        progress(f"growth, {name}")
        calls = {}
        with torch.inference_mode():
            for size in sizes:
                ours = contenders(shape(size), getattr(torch, DTYPE), backend, peers=False)[0]
                if ours.reason:
                    raise RuntimeError(f"growth, {name}, size {size}: backend {backend!r}: {ours.reason}")
                calls[str(size)] = ours.call
            seconds, _ = round_robin(calls, {}, rounds)
        curves.append(Curve(name, sizes, [seconds[str(size)] for size in sizes], expected, tolerance))
    return curves


def causal_share(curves: list[Curve]) -> Verdict:
    """Causal attention's time over full attention's, at the longest length."""
    full, causal = (next(curve for curve in curves if curve.name == f"prefill, {kind}").seconds[-1] for kind in ("full", "causal"))
    return Verdict("growth, causal halves", causal <= CAUSAL_SHARE * full,
                   f"{causal / full:.2f} of full attention's time at {PREFILL[-1]}, required <= {CAUSAL_SHARE:g}")
