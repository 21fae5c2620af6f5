"""CUDA graphs: a decode step over pages, a prefill and a norm are captured once and replayed with other numbers in the same tensors.

A replay must give what a plain call gives, to the bit: whatever was decided on the host (tiles, splits) belongs to the capture, lengths and
tables are read on the device. A backend that waits for the device, or allocates outside the pool, fails here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hetero_attn import registry
from hetero_attn.backend import UnsupportedError
from hetero_attn.ops import attention, attention_varlen
from hetero_attn.testing.gpu.graph_seam import Seam, seam_of
from hetero_attn.testing.gpu.outcome import FAILED, PASSED, Outcome, skipped

CAPTURABLE = ("triton", "hopper")                    # what promises it; sdpa's packed route runs sequence by sequence
RIGHT, OBJECTED = "as a plain call", "it does not take the call, or not into a graph"


def as_plain(call, refill, seam) -> bool:
    """Whether a captured call, replayed after `refill()` has put other numbers into its tensors, equals a plain call."""
    (out,), replay = seam.captured(lambda: (call(),))
    refill()
    replay()
    return torch.equal(out, call())


def graphs(device: torch.device) -> Outcome:
    """Every capturable backend that is here."""
    if device.type != "cuda":
        return skipped(f"{device.type} has no CUDA graphs")
    names = [name for name in CAPTURABLE if name in registry.names() and not registry.unavailable(registry.get(name))]
    if not names:
        return skipped(f"none of {', '.join(CAPTURABLE)} is available here")
    found = [(name, what, verdict(name, make, device, seam_of(device))) for name in names for what, make in CALLS.items()]
    failed = any(words not in (RIGHT, OBJECTED) for *_, words in found)
    return Outcome(FAILED if failed else PASSED, "\n".join(f"{name}, {what}: {words}" for name, what, words in found))


def verdict(name: str, make: Callable, device: torch.device, seam: Seam) -> str:
    """Of one call of a backend, in words: RIGHT, OBJECTED (it does not take the call, captured or not), or what is wrong."""
    try:
        return RIGHT if as_plain(*make(name, device), seam) else "DIFFERS from a plain call"
    except UnsupportedError as error:
        return OBJECTED if any(error.reasons.values()) else f"UnsupportedError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


def _prefill(name: str, device: torch.device):
    q, k, v = (torch.randn(2, heads, 200, 64, dtype=torch.bfloat16, device=device) for heads in (8, 2, 2))
    return lambda: attention(q, k, v, is_causal=True, backend=name), lambda: [x.normal_() for x in (q, k, v)]


def _decode(name: str, device: torch.device):
    """Lengths change between capture and replay, up to the longest that the capture was told of."""
    q = torch.randn(4, 8, 64, dtype=torch.bfloat16, device=device)
    k, v = (torch.randn(200, 16, 2, 64, dtype=torch.bfloat16, device=device) for _ in range(2))
    table = torch.randperm(200, device=device)[:160].to(torch.int32).view(4, 40)
    lengths = torch.tensor([5, 100, 300, 17], dtype=torch.int32, device=device)
    starts = torch.arange(5, dtype=torch.int32, device=device)
    call = lambda: attention_varlen(q, k, v, starts, None, 1, 640, block_table=table, seqused_k=lengths, is_causal=True, backend=name)

    def refill():
        q.normal_()
        lengths.copy_(torch.tensor([640, 1, 301, 18], dtype=torch.int32))

    return call, refill


def _norm(name: str, device: torch.device):
    x, weight = torch.randn(33, 1024, dtype=torch.bfloat16, device=device), torch.randn(1024, dtype=torch.bfloat16, device=device)
    return lambda: registry.get(name).rms_norm(x, weight, 1e-5), lambda: x.normal_()


CALLS = {"prefill": _prefill, "decode over pages": _decode, "norm": _norm}
