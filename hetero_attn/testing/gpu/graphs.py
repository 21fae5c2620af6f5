"""CUDA graphs: a decode step over pages, a prefill and a norm are captured once and replayed with other numbers in the same tensors.

A replay must give what a plain call gives, to the bit: whatever was decided on the host (tiles, splits) belongs to the capture, lengths and
tables are read on the device. A backend that waits for the device, or allocates outside the pool, fails here.
"""

from __future__ import annotations

import torch

from hetero_attn import registry
from hetero_attn.ops import attention, attention_varlen
from hetero_attn.testing.gpu.outcome import FAILED, PASSED, Outcome, skipped

CAPTURABLE = ("triton", "hopper")                    # what promises it; sdpa's packed route runs sequence by sequence


def captured(call, refill) -> bool:
    """Whether a captured call, replayed after `refill()` has put other numbers into its tensors, equals a plain call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):                  # what is compiled or allocated on first use is so before the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    refill()
    graph.replay()
    torch.cuda.synchronize()
    return torch.equal(out, call())


def graphs(device: torch.device) -> Outcome:
    """Every capturable backend that is here."""
    if device.type != "cuda":
        return skipped(f"{device.type} has no CUDA graphs")
    names = [name for name in CAPTURABLE if name in registry.names() and not registry.unavailable(registry.get(name))]
    if not names:
        return skipped(f"none of {', '.join(CAPTURABLE)} is available here")
    lines, failed = [], False
    for name in names:
        for what, make in (("prefill", _prefill), ("decode over pages", _decode), ("norm", _norm)):
            try:
                verdict = "as a plain call" if captured(*make(name, device)) else "DIFFERS from a plain call"
            except Exception as error:
                verdict = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
            failed |= verdict != "as a plain call"
            lines.append(f"{name}, {what}: {verdict}")
    return Outcome(FAILED if failed else PASSED, "\n".join(lines))


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
