"""Is an instruction set that nobody has run on real hardware right on this machine? Small fixed calls, compared with the portable object's.

Run once, when such an object is loaded, in well under a second. It covers every dtype, both kernels (few rows and many), split key ranges,
pages and each feature, so that a wrong intrinsic or a miscompiled kernel shows before it serves anyone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hetero_attn.spec import AttentionSpec, Operands, dtype_name
from hetero_attn_cpu.calls import attention, linear
from hetero_attn_cpu.library import Library

# Two kernels that are right differ by the order of their sums and by one rounding of the result: |a - b| <= bound * (1 + |b|).
BOUNDS = {torch.float32: 4e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LSE_BOUND = 1e-3
FEATURES: dict[str, dict] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window_size": (5, 2)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": 1},
    "bool mask": {"mask": torch.bool},
    "float mask": {"mask": torch.float32},
    "sinks": {"sinks": True},
    "NaN in unseen keys": {"is_causal": True},
}
SHAPES = {"decode": (1, 37), "split decode": (1, 1100), "prefill": (19, 37), "long prefill": (140, 150)}       # q_len, kv_len
MATRICES = ((1, 70, 96), (4, 33, 130), (37, 40, 64))                                                           # M, N, K


def objections(library: Library, trusted: Library) -> list[str]:
    """What `library` computes otherwise than `trusted`, a line a call; [] = nothing."""
    found = []
    for label, call in _attention_calls():
        out, lse = attention(library, *call)
        want, want_lse = attention(trusted, *call)
        bound = BOUNDS[out.dtype]
        if not (_close(out, want, bound) and _close(lse, want_lse, max(bound / 10, LSE_BOUND))):
            found.append(f"attention ({label}, {dtype_name(out.dtype)}) differs from the portable kernels")
    for dtype, (M, N, K) in ((dtype, sizes) for dtype in BOUNDS for sizes in MATRICES):
        random = torch.Generator().manual_seed(M)
        x, weight, bias = (torch.randn(size, generator=random).to(dtype) for size in ((M, K), (N, K), (N,)))
        y, want = torch.full((M, N), float("nan"), dtype=dtype), torch.full((M, N), float("nan"), dtype=dtype)
        linear(library, x, weight, bias, y)
        linear(trusted, x, weight, bias, want)
        if not _close(y, want, BOUNDS[dtype] * K**0.5):
            found.append(f"linear ({M}x{K} by {N}x{K}, {dtype_name(dtype)}) differs from the portable kernels")
    return found


def _close(actual: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    return torch.allclose(actual.float(), expected.float(), rtol=bound, atol=bound, equal_nan=True)


def _attention_calls() -> Iterator[tuple[str, tuple]]:
    """(label, arguments of calls.attention after the library)."""
    for dtype in BOUNDS:
        for (shape, (q_len, kv_len)), (feature, options) in ((s, f) for s in SHAPES.items() for f in FEATURES.items()):
            if shape in ("prefill", "decode") or feature in ("plain", "window", "NaN in unseen keys"):
                yield f"{shape}, {feature}", _dense(dtype, q_len, kv_len, feature, options)
        for label, page_size in (("packed", 0), ("pages of 16", 16)):
            yield label, _varlen(dtype, page_size)


def _dense(dtype: torch.dtype, q_len: int, kv_len: int, feature: str, options: dict) -> tuple:
    random = torch.Generator().manual_seed(q_len + kv_len)
    normal = lambda *shape: torch.randn(shape, generator=random)
    q, k, v = normal(2, 6, q_len, 40).to(dtype), normal(2, 2, kv_len, 40).to(dtype), normal(2, 2, kv_len, 24).to(dtype)
    mask = normal(2, 1, q_len, kv_len)
    if feature.startswith("NaN") and q_len > 1:
        v[:, :, -1] = float("nan")                   # only the last row sees it
    operands = Operands(
        attn_mask=None if "mask" not in options else mask > -0.5 if options["mask"] is torch.bool else mask,
        alibi_slopes=normal(6).abs() if options.get("alibi") else None, sinks=normal(6) if options.get("sinks") else None,
    )
    spec = AttentionSpec("cpu", dtype, 2, 6, 2, q_len, kv_len, 40, 24, scale=0.2, return_lse=True, **options)
    return q, k, v, spec, operands


def _varlen(dtype: torch.dtype, page_size: int) -> tuple:
    random = torch.Generator().manual_seed(page_size)
    q_lens, kv_lens = (1, 20, 3), (45, 20, 30)
    tokens = (3 * 4, page_size) if page_size else (sum(kv_lens),)
    q, k, v = (torch.randn(size, generator=random).to(dtype) for size in ((sum(q_lens), 4, 64), (*tokens, 2, 64), (*tokens, 2, 64)))
    starts = [torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32) for lens in (q_lens, kv_lens)]
    if page_size:
        table = torch.randperm(12, generator=random).to(torch.int32).view(3, 4)
        operands = Operands(cu_seqlens_q=starts[0], block_table=table, seqused_k=torch.tensor(kv_lens, dtype=torch.int32))
    else:
        operands = Operands(cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])
    spec = AttentionSpec("cpu", dtype, 3, 4, 2, 20, 45, 64, 64, is_causal=True, scale=0.125, return_lse=True, varlen=True,
                         total_q=sum(q_lens), page_size=page_size)
    return q, k, v, spec, operands
