"""Causality and windows in the operators' words: sparse_mode, pre/next tokens, and the one compressed mask.

torch_npu's conventions, each the opposite of a habit from elsewhere: True in a mask means MASKED; sparse_mode 2 is top-left causal and 3
bottom-right (ours); 4 is a band whose tokens count from the bottom-right diagonal; modes 2 to 4 read one 2048 x 2048 upper-triangular mask
whatever the lengths, so that no S x S mask exists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hetero_attn.spec import AttentionSpec

ALL = 2147483647                            # the operators' "no limit", their default
COMPRESSED = 2048
WHOLE, MASK, CAUSAL, BAND = 0, 1, 3, 4      # sparse_mode: nothing masked, the mask as given, bottom-right causal, band


class Sparse(NamedTuple):
    """mode and the number of keys before and after the diagonal that a query sees."""

    mode: int
    before: int = ALL
    after: int = ALL


def sparse_of(spec: AttentionSpec, q_len: int, kv_len: int) -> Sparse:
    """Of a call without attn_mask whose queries are q_len and keys kv_len long; what cannot matter at these lengths is left out."""
    left, right = spec.window_size
    right = 0 if spec.is_causal else right
    left = -1 if left >= kv_len - 1 else left                       # reaches the first key from the last
    right = -1 if right >= q_len - 1 and right >= 0 else right      # from the first query to the last key
    if left < 0 and right < 0:
        return Sparse(WHOLE)
    if left < 0 and right == 0:
        return Sparse(CAUSAL)
    return Sparse(BAND, ALL if left < 0 else left, ALL if right < 0 else right)


def rows_without_keys(spec: AttentionSpec, q_len: int, kv_len: int) -> int:
    """How many queries, from the first on, see no key by their position: they stand before the first key by more than the window's right.
    The operators average over masked keys there, so these rows are never shown to them."""
    if not kv_len:
        return q_len
    right = 0 if spec.is_causal else spec.window_size[1]
    return 0 if right < 0 else max(0, min(q_len, q_len - kv_len - right))


def keys_in_reach(spec: AttentionSpec, q_len: int) -> int:
    """How many keys, from the last one back, at least one of the last q_len queries may see by the window's left edge."""
    left = spec.window_size[0]
    return ALL if left < 0 else q_len + left


class CompressedMask:
    """The 2048 x 2048 mask, made once a device."""

    def __init__(self) -> None:
        self._of: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """bool [2048, 2048], True above the diagonal: masked."""
        mask = self._of.get(device)
        if mask is None:
            mask = self._of[device] = torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=device).triu_(1)
        return mask


def full_mask(spec: AttentionSpec, attn_mask: torch.Tensor, q_len: int, kv_len: int) -> torch.Tensor:
    """bool [B|1, Hq|1, Sq, Skv], True = MASKED: the caller's mask (True = attend), causality and window in one. The caller's own mask is
    that large already."""
    masked = ~attn_mask
    left, right = spec.window_size
    right = 0 if spec.is_causal else right
    if left >= 0 or right >= 0:
        position = torch.arange(kv_len - q_len, kv_len, device=attn_mask.device)[:, None]
        key = torch.arange(kv_len, device=attn_mask.device)
        if left >= 0:
            masked = masked | (key < position - left)
        if right >= 0:
            masked = masked | (key > position + right)
    B, H = masked.shape[:2]
    return masked.expand(B, H, q_len, kv_len).contiguous()
