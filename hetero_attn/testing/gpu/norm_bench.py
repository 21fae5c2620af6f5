"""Residual add and RMSNorm at hidden 8192, 64 to 8192 tokens: what backends fuse, against torch's two steps, and against the copy.

The fused collective's norm half is the same work: a communicator that fuses is timed with a world of one. The bar is 80 % of the copy's
bandwidth from 1024 tokens on; below, a launch costs more than the bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hetero_attn import registry
from hetero_attn.communicator import SoloCommunicator
from hetero_attn.norm import rms_norm
from hetero_attn.spec import dtype_name
from hetero_attn.testing.gpu.ceilings import Ceilings, narrow_dtype, norm_bytes
from hetero_attn.testing.gpu.clock import medians
from hetero_attn.testing.gpu.outcome import Figure, Outcome, judged

HIDDEN, TOKENS, BAR, LEAST_TOKENS, EPS = 8192, (64, 256, 1024, 4096, 8192), 0.8, 1024, 1e-5
TORCH = "add, rms_norm"


def contenders(tokens: int, hidden: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Each adds x to a residual of its own and gives the norm, in narrow_dtype()."""
    x = torch.randn(tokens, hidden, dtype=narrow_dtype(device), device=device)
    weight = torch.randn(hidden, dtype=narrow_dtype(device), device=device)
    fresh = lambda: torch.randn(tokens, hidden, dtype=narrow_dtype(device), device=device)

    def in_two_steps(residual: torch.Tensor) -> torch.Tensor:
        residual += x
        return rms_norm(residual, weight, EPS)

    residual = fresh()
    made: dict[str, Callable[[], object]] = {TORCH: lambda: in_two_steps(residual)}
    if hasattr(torch.nn.functional, "rms_norm"):
        plain = fresh()
        made["add, torch's rms_norm"] = lambda: torch.nn.functional.rms_norm(plain.add_(x), (hidden,), weight, EPS)
    for name in registry.names():
        fused = getattr(registry.find(name), "add_rms_norm", None)
        if fused is not None and not registry.unavailable(registry.get(name)):
            own = fresh()
            made[name] = lambda fused=fused, own=own: fused(x, own, weight, EPS)
    shard = fresh()
    solo = SoloCommunicator(device=device)
    made["communicator of one"] = lambda: solo.all_reduce_rms_norm(x, shard, weight, EPS, site="layers.0.o_proj")
    return made


def norm(device: torch.device, ceilings: Ceilings, quick: bool) -> Outcome:
    """Microseconds and GB/s by tokens."""
    tokens, hidden = (TOKENS[1::2] if quick else TOKENS, HIDDEN) if device.type == "cuda" else ((16,), 64)
    rounds = 10 if quick else 40
    figures, table = [], [("tokens", "contender", "us", "GB/s", "of the copy")]
    for count in tokens:
        for name, seconds in medians(contenders(count, hidden, device), device, rounds, flush=True).items():
            if isinstance(seconds, str):
                table.append((str(count), name, seconds, "", ""))
                continue
            rate = norm_bytes(count, hidden, 2) / seconds / 1e9
            table.append((str(count), name, f"{1e6 * seconds:.1f}", f"{rate:.0f}", f"{100 * ceilings.of_bandwidth(rate):.0f} %"))
            if name in registry.names() and count >= LEAST_TOKENS:
                figures.append(Figure(f"{count} tokens, {name}, of the copy's bandwidth", ceilings.of_bandwidth(rate), "", BAR))
    return judged(f"hidden {hidden}, {dtype_name(narrow_dtype(device))}, medians of {rounds}", figures, table)
