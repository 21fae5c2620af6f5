"""What is required of a measured figure, as rules over plain numbers: each gives a Verdict whose text holds both sides.

A rule never looks at a clock, so every boundary can be tested. Margins for noise stand here by name and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cpu.shapes import Shape, figure, geometric_mean

PARITY = 0.95                       # "parity" of two timings on a machine whose bandwidth drifts by more than that in a minute
OVER_TORCH = 1.3                    # where torch itself is the best peer
MEAN_OVER_PEERS = 1.3
PREFILL_SHARE, PREFILL_SHARE_SHORT, SHORT = 0.75, 0.65, 512
DECODE_TIMES_LIMIT = 1.5
PRODUCT_SHARE, PRODUCT_SHARE_ONE_ROW = 0.75, 0.85
DECODER_SHARE, PREFILL_OVER_TRANSFORMERS = 0.75, 4.0


@dataclass(frozen=True)
class Verdict:
    """One required line: what it is about, whether it holds, and the figures."""

    about: str
    passed: bool
    text: str

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.about}: {self.text}"


def needed_speedup(name: str, dtype: str, limit: float) -> tuple[float, bool]:
    """(speed-up over torch SDPA that shape `name` needs, whether reaching it is enough or it must be surpassed).

    limit: the speed-up over torch SDPA at which this machine's memory ends; where bandwidth alone counts nobody can pass it.
    """
    best = figure(name, dtype)[0]
    if name == "D3" and dtype == "float32":               # bandwidth alone
        return PARITY * min(best, limit), True
    return (OVER_TORCH, True) if best <= 1.0 else (best, False)


def over_figures(name: str, dtype: str, speedup: float, limit: float) -> Verdict:
    """Against the best peer's figure of the table (another machine's, but a ratio)."""
    needed, reached = needed_speedup(name, dtype, limit)
    passed = speedup >= needed if reached else speedup > needed
    return Verdict(f"{name} {dtype} over torch SDPA", passed, f"{speedup:.2f}x, required {'>=' if reached else '>'} {needed:.2f}x")


def over_peers(name: str, dtype: str, speedup: float, peers: dict[str, float]) -> Verdict:
    """Against the peers measured in this run (their speed-ups over torch SDPA; torch's own 1.0 is always among them)."""
    best, who = max([(1.0, "torch SDPA"), *((value, peer) for peer, value in peers.items())])
    needed = PARITY * best if name == "D3" and dtype == "float32" else best
    return Verdict(f"{name} {dtype} over the peers of this run", speedup > needed, f"{speedup:.2f}x, best is {who} at {best:.2f}x")


def mean_over(about: str, speedups: Iterable[float], bests: Iterable[float]) -> Verdict:
    """Geometric mean of ours against that of the best peers."""
    ours, peers = geometric_mean(speedups), geometric_mean(bests)
    return Verdict(about, ours >= MEAN_OVER_PEERS * peers,
                   f"geometric mean {ours:.2f}x, best peers' {peers:.2f}x, ratio {ours / peers:.2f}, required >= {MEAN_OVER_PEERS:g}")


def prefill(name: str, dtype: str, shape: Shape, seconds: float, gemm: float) -> Verdict:
    """Share of the fp32 GEMM rate measured in the same run, visible pairs alone counted as work."""
    share = shape.flops / seconds / gemm
    needed = PREFILL_SHARE_SHORT if shape.q_len <= SHORT else PREFILL_SHARE
    return Verdict(f"{name} {dtype} share of the GEMM rate", share >= needed,
                   f"{shape.flops / seconds / 1e9:.0f} of {gemm / 1e9:.0f} GFLOP/s, {share:.0%}, required >= {needed:.0%}")


def decode(name: str, dtype: str, shape: Shape, seconds: float, limit: float) -> Verdict | None:
    """Times the limit, where it is required: batch 8, or as many KV heads as query heads. None elsewhere."""
    if shape.batch < 8 and shape.q_heads != shape.kv_heads:
        return None
    return Verdict(f"{name} {dtype} times the limit", seconds <= DECODE_TIMES_LIMIT * limit,
                   f"{seconds * 1e3:.2f} ms, limit {limit * 1e3:.2f} ms, {seconds / limit:.2f}, required <= {DECODE_TIMES_LIMIT:g}")


def product(rows: int, dtype: str, flops: float, limit: float) -> Verdict:
    """Share of min(GEMM rate, read rate * intensity), in flop/s both."""
    needed = PRODUCT_SHARE_ONE_ROW if rows == 1 else PRODUCT_SHARE
    return Verdict(f"linear M={rows} {dtype}", flops >= needed * limit,
                   f"{flops / 1e9:.1f} of {limit / 1e9:.1f} GFLOP/s, {flops / limit:.0%}, required >= {needed:.0%}")


def growth(about: str, slope: float, expected: float, tolerance: float) -> Verdict:
    """A fitted exponent beside the one it should be."""
    return Verdict(about, abs(slope - expected) <= tolerance, f"exponent {slope:.2f}, expected {expected:g} +- {tolerance:g}")


def decoder_decode(tokens_per_s: float, limit: float) -> Verdict:
    """Decode against the weights' bytes over the read rate, in tokens/s both."""
    return Verdict("generate, decode", tokens_per_s >= DECODER_SHARE * limit,
                   f"{tokens_per_s:.1f} tokens/s, limit {limit:.1f}, {tokens_per_s / limit:.0%}, required >= {DECODER_SHARE:.0%}")


def decoder_prefill(tokens_per_s: float, transformers: float) -> Verdict:
    """Prefill against transformers', in tokens/s both."""
    return Verdict("generate, prefill", tokens_per_s >= PREFILL_OVER_TRANSFORMERS * transformers,
                   f"{tokens_per_s:.0f} tokens/s, transformers {transformers:.0f}, {tokens_per_s / transformers:.2f}x, "
                   f"required >= {PREFILL_OVER_TRANSFORMERS:g}x")
