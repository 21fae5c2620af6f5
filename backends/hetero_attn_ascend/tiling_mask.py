"""Tiling-mask (FastAttention, arXiv 2410.16663): one (2M) x (2M) mask serves every block of every call; no S x S mask exists.

The mask is MASK[i, j] = j > i, 1 = masked. A block of bm <= M query rows that stand at keys q0, q0+1, ... (bottom-right alignment is
already in q0) against bn <= M keys from k0 on needs MASK[r + d, c] with d = q0 - k0: the rows from d on where d >= 0, or the columns from
-d on where d < 0. Only blocks that the diagonal crosses need one. The same mask serves a window's left edge: key k is too old for query q
if k < q - left, which is the complement of the mask at d - left - 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Window(NamedTuple):
    """Where a block's mask begins in the (2M) x (2M) one."""

    row: int
    column: int


WHOLE, NOTHING = "whole", "nothing"             # every key of the block is seen; none is


def side(block_m: int, block_n: int) -> int:
    """2M: the side of the mask that serves blocks of up to block_m x block_n."""
    return 2 * max(block_m, block_n)


def tiling_mask(size: int, dtype: torch.dtype = torch.uint8, device: torch.device | str = "cpu") -> torch.Tensor:
    """[size, size], 1 where j > i: masked."""
    return torch.ones(size, size, dtype=dtype, device=device).triu_(1)


def right_edge(d: int, rows: int, keys: int) -> Window | str:
    """What a block sees where query r sees key c if c <= r + d: WHOLE, NOTHING, or the mask's window (1 = not seen).

    >>> right_edge(0, 4, 4), right_edge(5, 4, 4), right_edge(-2, 4, 4), right_edge(-4, 4, 4)
    (Window(row=0, column=0), 'whole', Window(row=0, column=2), 'nothing')
    """
    if d >= keys - 1:
        return WHOLE
    if d <= -rows:
        return NOTHING
    return Window(d, 0) if d >= 0 else Window(0, -d)


def left_edge(d: int, rows: int, keys: int) -> Window | str:
    """The same where query r sees key c if c >= r + d: the window's 0 are not seen and its 1 are (the complement of right_edge(d - 1))."""
    edge = right_edge(d - 1, rows, keys)
    if isinstance(edge, Window):
        return edge
    return NOTHING if edge == WHOLE else WHOLE


def block_edges(d: int, rows: int, keys: int, left: int, right: int) -> tuple[Window | str, Window | str]:
    """(left edge, right edge) of a block; d = position of its first query - its first key; left, right: the window, -1 = unlimited.
    Causality is right = 0. A block of which either edge is NOTHING is skipped."""
    return (
        left_edge(d - left, rows, keys) if left >= 0 else WHOLE,
        right_edge(d + right, rows, keys) if right >= 0 else WHOLE,
    )


def visible(mask: torch.Tensor, edges: tuple[Window | str, Window | str], rows: int, keys: int) -> torch.Tensor | None:
    """bool [rows, keys] cut from the one mask, None = everything is seen. Raises ValueError if a window leaves the mask."""
    seen = None
    for edge, seen_where in zip(edges, (1, 0)):
        if edge == NOTHING:
            return torch.zeros(rows, keys, dtype=torch.bool)
        if isinstance(edge, Window):
            cut = mask[edge.row : edge.row + rows, edge.column : edge.column + keys]
            if cut.shape != (rows, keys):
                raise ValueError(f"mask window {tuple(edge)} of {rows} x {keys} leaves the mask of {list(mask.shape)}")
            seen = (cut == seen_where) if seen is None else seen & (cut == seen_where)
    return seen
