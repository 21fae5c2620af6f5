"""NaN and Inf in keys that some rows do not see are kept from those rows: zeroed for the product, put back for the rows that see them.

A masked key's weight is 0, and 0 times NaN is NaN, on any device whose product runs over masked keys. Looking first would make the host
wait for the device, so both are done without looking, where causality or a window lets rows differ in what they see.
"""

from __future__ import annotations

import torch

from hetero_attn.spec import AttentionSpec


def finite(
    spec: AttentionSpec, k: torch.Tensor, v: torch.Tensor, q_len: int, q_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense k, v [B, Hkv, Skv, ·] with zeros for what is not finite, and bool [B, Hq, q_len]: the rows that see such a key."""
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))                                            # [B, Hkv, Skv]
    return k.nan_to_num(0.0, 0.0, 0.0), v.nan_to_num(0.0, 0.0, 0.0), _seen(spec, bad, q_len, q_heads)


def finite_packed(
    spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: list[tuple[int, int, int, int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed k, v [Tk, Hkv, ·] likewise, and bool [Tq, Hq]. pieces: (first row, last row + 1, first key, last key + 1) a sequence."""
    bad = ~(k.isfinite().all(-1) & v.isfinite().all(-1))                                            # [Tk, Hkv]
    tainted = torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device)
    for r0, r1, k0, k1 in pieces:
        tainted[r0:r1] = _seen(spec, bad[k0:k1].T[None], r1 - r0, q.shape[1])[0].T
    return k.nan_to_num(0.0, 0.0, 0.0), v.nan_to_num(0.0, 0.0, 0.0), tainted


def _seen(spec: AttentionSpec, bad: torch.Tensor, q_len: int, q_heads: int) -> torch.Tensor:
    """bad [B, Hkv, Skv] -> bool [B, Hq, q_len]: rows (the last q_len, bottom-right) that see a bad key."""
    kv_len = bad.shape[-1]
    position = torch.arange(kv_len - q_len, kv_len, device=bad.device)
    left, right = spec.window_size
    right = 0 if spec.is_causal else right
    first = (position - left).clamp(0, kv_len) if left >= 0 else torch.zeros_like(position)
    last = (position + right + 1).clamp(0, kv_len) if right >= 0 else torch.full_like(position, kv_len)
    before = torch.nn.functional.pad(bad.int().cumsum(-1), (1, 0))                                  # bad keys before each position
    seen = before.index_select(-1, torch.maximum(first, last)) - before.index_select(-1, first)     # [B, Hkv, q_len]
    return (seen > 0).repeat_interleave(q_heads // bad.shape[1], dim=1)
