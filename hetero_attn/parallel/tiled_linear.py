"""FastAttention's tiling-AllReduce for one row-parallel linear: the sum of a tile goes on beside the product of the next.

The decoder's tiled schedule does the same with the norm that follows (schedule.py); this is the bare operation, for callers of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hetero_attn.parallel.linear import RowParallelLinear


def tiled_linear(layer: RowParallelLinear, x: torch.Tensor, tiles: Sequence[range]) -> torch.Tensor:
    """x [T, own features] -> [T, out], summed over the ranks: layer(x), cut along the tokens.

    tiles: ranges of rows that cover 0 to T in order, as split_tiles() places them; the same on every rank. Raises ValueError for others
    and CommunicatorError.
    """
    begins, ends = [tile.start for tile in tiles], [tile.stop for tile in tiles]
    if [*begins, len(x)] != [0, *ends]:                                       # each begins where the one before it ends
        raise ValueError(f"tiles are {list(tiles)}, expected ranges that follow each other from 0 to {len(x)}")
    communicator = layer.communicator
    coming = [communicator.start_all_reduce(layer.partial(x[tile.start : tile.stop]), site=layer.site) for tile in tiles]
    return torch.cat([handle.wait() for handle in coming])                                             # [T, out]
