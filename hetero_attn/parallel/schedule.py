"""Running a decoder's blocks in a schedule's order: one lane computes, the other sums over the ranks and norms, each as early as it can.

A decoder says what its blocks are (an attention or an MLP each), a Cut says how the step's rows are divided, order() says who goes when.
The residual stream lives in shards: of every tile a rank holds the rows it owns, adds to them and norms them, and what the others get is
the normed rows alone (TokenWeave's fused all-reduce and RMSNorm). The lanes are the communicator's: a thread beside the calling one where
tensors are on the CPU, a side stream on a device; nothing here knows which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.parallel.schedule_order import EMBED, INNER, PRODUCT, Cut, order
from hetero_attn.parallel.trace import Recorder, recorded


@dataclass(frozen=True)
class SumNorm:
    """What follows a sum over the ranks: the residual add and this norm. weight, post_weight [C]; as all_reduce_rms_norm takes them."""

    weight: torch.Tensor
    eps: float
    weight_offset: float = 0.0
    post_weight: torch.Tensor | None = None


@dataclass(frozen=True)
class Block:
    """Half a decoder layer, between two sums over the ranks.

    site     the sum's address in the model ("layers.3.o_proj")
    inner    (normed [t, C], context) -> [t, K]: all that comes before the row-parallel weight; called part after part
    product  [n, K] -> this rank's summand [n, C]; rows are independent, so it is called tile by tile
    norm     what follows the sum
    """

    site: str
    inner: Callable[[torch.Tensor, Any], torch.Tensor]
    product: Callable[[torch.Tensor], torch.Tensor]
    norm: SumNorm


def run_blocks(
    blocks: Sequence[Block],
    first_norm: Callable[[torch.Tensor], torch.Tensor],
    embed: Callable[[range, CommunicationLane], Callable[[], torch.Tensor]],
    contexts: Sequence[Any],
    cut: Cut,
    communicator: Communicator,
    recorder: Recorder | None = None,
) -> torch.Tensor:
    """The embedded rows through all blocks -> [T, C] under the last block's norm, the same on every rank.

    embed: begins to fetch the embedded rows of a part by the lane, and gives what waits for them [t, C]. first_norm: the first block's,
    which needs no sum. contexts: what `inner` is told of each part of the cut. Every rank makes this call with an equal cut. Raises what
    a block raises and CommunicatorError.
    """
    if len(contexts) != len(cut.tiles):
        raise ValueError(f"{len(contexts)} contexts for a cut in {len(cut.tiles)} parts ({cut})")
    lane = CommunicationLane(communicator, recorder, asynchronous=cut.overlaps)
    coming: list[list[Callable[[], torch.Tensor]]] = [[] for _ in cut.tiles]             # of each part, its tiles' rows
    residual: dict[range, torch.Tensor] = {}                                             # of each tile, the rows that this rank owns
    for task in order(len(blocks), cut):
        block, part, tile = blocks[task.block], cut.parts[task.part], cut.tiles[task.part][task.tile]
        if task.kind == EMBED:
            coming[task.part] = [embed(part, lane)]
        elif task.kind == INNER:
            rows = _joined([arrive() for arrive in coming[task.part]])                       # [t, C]
            coming[task.part] = []
            if task.block == 0:
                for tile in cut.tiles[task.part]:
                    residual[tile] = rows[tile.start - part.start : tile.stop - part.start][communicator.rows(len(tile))].clone()
                rows = first_norm(rows)
            with recorded(recorder, f"{task.kind} {block.site}", len(part), task.part):
                y = block.inner(rows, contexts[task.part])                                   # [t, K]
        elif task.kind == PRODUCT:
            with recorded(recorder, f"{task.kind} {block.site}", len(tile), task.part):
                summand = block.product(y[tile.start - part.start : tile.stop - part.start])     # [n, C]
        else:
            norm = block.norm
            coming[task.part].append(lane.start(
                f"sum {block.site}", task.part, "all_reduce_rms_norm", summand, residual[tile], norm.weight, norm.eps, site=block.site,
                weight_offset=norm.weight_offset, post_weight=norm.post_weight,
            ))
    return _joined([arrive() for part in coming for arrive in part])


class CommunicationLane:
    """Operations of a communicator, one after the other beside the compute lane; at once where nothing could be computed meanwhile."""

    def __init__(self, communicator: Communicator, recorder: Recorder | None = None, *, asynchronous: bool) -> None:
        self._communicator, self._recorder, self._asynchronous = communicator, recorder, asynchronous

    def start(self, name: str, part: int, operation: str, x: torch.Tensor, *arguments: Any, **options: Any) -> Callable[[], torch.Tensor]:
        """Begin the operation on x [n, ...] -> what waits for it and gives its result, of several the first. name, part: for the trace."""
        if self._recorder is not None:
            do = self._recorder.start if self._asynchronous else self._recorder.call
            found = do(self._communicator, name, x.shape[0], part, operation, (x, *arguments), options)
        elif self._asynchronous:
            found = self._communicator.start(operation, x, *arguments, **options).wait
        else:
            found = getattr(self._communicator, operation)(x, *arguments, **options)
        return (lambda: _first(found())) if self._asynchronous else (lambda: _first(found))


def _first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    """[T, C] of the tiles' [n, C]."""
    return rows[0] if len(rows) == 1 else torch.cat(rows)
