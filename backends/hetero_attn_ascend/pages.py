"""Keys and values gathered from their pages into packed ones, as far as the lengths say: entries beyond a length are never read."""

from __future__ import annotations

import torch


def gathered(
    k: torch.Tensor, v: torch.Tensor, block_table: torch.Tensor, kv_lens: list[int], page_size: int, shown: list[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """k, v pages [num_blocks, page_size, Hkv, ·] -> packed [sum of shown, Hkv, ·], and where each sequence begins, the end included.
    shown: how many of each sequence's last keys are copied; None = all."""
    shown = kv_lens if shown is None else shown
    starts = [0]
    for length in shown:
        starts.append(starts[-1] + length)
    slots = _slots(block_table, kv_lens, shown, page_size)
    return k.flatten(0, 1)[slots], v.flatten(0, 1)[slots], starts


def _slots(block_table: torch.Tensor, kv_lens: list[int], shown: list[int], page_size: int) -> torch.Tensor:
    """Where each sequence's tokens lie among all slots of all pages: int64 [sum of shown]. Entries beyond a length are not read."""
    found = []
    for b, length in enumerate(kv_lens):
        token = torch.arange(length - shown[b], length, device=block_table.device)
        found.append(block_table[b].long()[token // page_size] * page_size + token % page_size)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long, device=block_table.device)
