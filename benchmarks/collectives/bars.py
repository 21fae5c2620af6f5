"""What is required of the collectives, as rules over plain numbers, and the arithmetic of a payload's bits. No clock, no rank.

Bounds stand here by name and nowhere else. OpenMPI's figures are those of shared/baselines.md: another machine's (2 cores AMD Zen 3,
2026-11-21), so they are shown as what was published, and one of them is the bar for 16 MiB.
"""

from __future__ import annotations

from collections.abc import Iterable

from cpu.verdicts import Verdict

KIB, MIB = 1 << 10, 1 << 20
SIZES = (8 * KIB, 64 * KIB, MIB, 16 * MIB)
OPENMPI_WHERE = "OpenMPI 4.1.4, 2 cores AMD Zen 3, 2026-11-21"
OPENMPI_S = {                                        # ranks -> bytes -> seconds (lowest and highest seen)
    2: {8 * KIB: (5e-6, 9e-6), 64 * KIB: (17e-6, 39e-6), MIB: (153e-6, 368e-6), 16 * MIB: (5.9e-3, 5.9e-3)},
    4: {8 * KIB: (56e-6, 56e-6), 64 * KIB: (106e-6, 106e-6), MIB: (953e-6, 953e-6), 16 * MIB: (16.8e-3, 16.8e-3)},
}
FUSED_TIMES = {1: 25.0, 8: 25.0, 128: 4.0}           # tokens -> times faster than gloo, add and norm
SMALL_S = {2: 5e-6, 4: 60e-6}                        # ranks -> seconds of 8 KiB from Python
ROW_TIMES = {(4, 1.0): 2.5, (8, 1.0): 3.5, (8, 5.0): 6.0}            # (ranks, ms) -> times faster than gloo
NEAR, NEAR_SHARE = 0.30, 0.9
MOST_BITS = 4.3
PAYLOAD_TIMES = {(2, "one_shot"): 3.0, (4, "one_shot"): 1.7, (4, "two_shot"): 2.5}      # over the best bf16 algorithm
STRESS_CALLS = 50_000
FP32_ROUNDING = 1e-5                                 # largest |fused - unfused|, where values are about 1


def at_least(about: str, times: float, needed: float) -> Verdict:
    """A speed-up."""
    return Verdict(about, times >= needed, f"{times:.2f}x, required >= {needed:g}x")


def at_most(about: str, seconds: float, needed: float) -> Verdict:
    """A time."""
    return Verdict(about, seconds <= needed, f"{duration(seconds)}, required <= {duration(needed)}")


def bits(about: str, found: float) -> Verdict:
    return Verdict(about, found <= MOST_BITS, f"{found:.3f} bits a value, required <= {MOST_BITS:g}")


def predictions(pairs: Iterable[tuple[float, float]]) -> Verdict:
    """pairs: (measured, predicted) seconds of points that the model was not calibrated on."""
    errors = [error(measured, predicted) for measured, predicted in pairs]
    near = sum(abs(each) <= NEAR for each in errors)
    share = near / len(errors) if errors else 0.0
    return Verdict("the model's predictions", share >= NEAR_SHARE,
                   f"{near} of {len(errors)} points within {NEAR:.0%} of the clock, {share:.0%}, required >= {NEAR_SHARE:.0%}"
                   + (f" (the worst {max(errors, key=abs):+.0%})" if errors else ""))


def error(measured: float, predicted: float) -> float:
    """How far a prediction is off, of the measured time."""
    return predicted / measured - 1.0


def holds(about: str, fact: bool, text: str) -> Verdict:
    return Verdict(about, fact, text)


def copies(algorithm: str, ranks: int) -> float:
    """How often each value of a tensor leaves a rank in an all-reduce: what a rank's bytes are to be divided by to get bits a value."""
    found = {"one_shot": ranks - 1.0, "two_shot": 2.0 * (ranks - 1) / ranks, "ring": 2.0 * (ranks - 1) / ranks}
    if algorithm not in found:
        raise ValueError(f"algorithm is {algorithm!r}, expected one of {', '.join(found)}")
    return found[algorithm]


def bits_per_value(nbytes: float, values: int, algorithm: str, ranks: int) -> float:
    """nbytes: what a rank sent for one all-reduce of `values` values."""
    return 8.0 * nbytes / (values * copies(algorithm, ranks))


def duration(seconds: float) -> str:
    """3.21 us, 4.5 ms, 1.2 s."""
    unit, name = (1.0, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "us")
    return f"{seconds / unit:.3g} {name}"


def size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= MIB else f"{nbytes >> 10} KiB" if nbytes >= KIB else f"{nbytes} B"
