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
from hetero_attn.parallel.schedule_order import INNER, PRODUCT, Cut, Task, order
from hetero_attn.parallel.trace import Recorder


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
    x: torch.Tensor,
    contexts: Sequence[Any],
    cut: Cut,
    communicator: Communicator,
    recorder: Recorder | None = None,
) -> torch.Tensor:
    """x [T, C], the embedded rows, through all blocks -> [T, C] under the last block's norm, the same on every rank.

    contexts: what `inner` is told of each part of the cut. first_norm: the first block's, which needs no sum. Every rank makes this call
    with an equal cut. Raises what a block raises and CommunicatorError.
    """
    if cut.total != x.shape[0] or len(contexts) != len(cut.tiles):
        raise ValueError(f"a cut of {cut.total} rows in {len(cut.tiles)} parts, for x {list(x.shape)} and {len(contexts)} contexts")
    lane = CommunicationLane(communicator, recorder, asynchronous=cut.overlaps)
    own = {tile: x[tile.start : tile.stop][communicator.rows(len(tile))].clone() for part in cut.tiles for tile in part}
    coming: list[list[Callable[[], torch.Tensor]]] = [[] for _ in cut.tiles]             # of each part, its tiles' normed rows
    y = summand = x
    for task in order(len(blocks), cut):
        block, part = blocks[task.block], cut.parts[task.part]
        if task.kind == INNER:
            normed = _joined([arrive() for arrive in coming[task.part]]) if task.block else first_norm(x[part.start : part.stop])
            coming[task.part] = []
            with _recorded(recorder, task, block.site, len(part)):
                y = block.inner(normed, contexts[task.part])                                 # [t, K]
        elif task.kind == PRODUCT:
            tile = cut.tiles[task.part][task.tile]
            with _recorded(recorder, task, block.site, len(tile)):
                summand = block.product(y[tile.start - part.start : tile.stop - part.start])     # [n, C]
        else:
            tile = cut.tiles[task.part][task.tile]
            coming[task.part].append(lane.start(task, block, summand, own[tile]))
    return _joined([arrive() for part in coming for arrive in part])


class CommunicationLane:
    """Sums with their norms, one after the other beside the compute lane; at once where nothing could be computed meanwhile."""

    def __init__(self, communicator: Communicator, recorder: Recorder | None, *, asynchronous: bool) -> None:
        self._communicator, self._recorder, self._asynchronous = communicator, recorder, asynchronous

    def start(self, task: Task, block: Block, summand: torch.Tensor, residual_shard: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin the sum of `summand` [n, C] -> what waits for it and gives the normed rows [n, C]. residual_shard is updated."""
        norm, communicator = block.norm, self._communicator
        arguments = (summand, residual_shard, norm.weight, norm.eps)
        options = {"site": block.site, "weight_offset": norm.weight_offset, "post_weight": norm.post_weight}
        if self._recorder is not None:
            call = self._recorder.communication(communicator, f"sum {block.site}", summand.shape[0], task.part)
            return call(arguments, options, asynchronous=self._asynchronous)
        if not self._asynchronous:
            normed, _ = communicator.all_reduce_rms_norm(*arguments, **options)
            return lambda: normed
        handle = communicator.start_all_reduce_rms_norm(*arguments, **options)
        return lambda: handle.wait()[0]


class _Unrecorded:
    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


_UNRECORDED = _Unrecorded()


def _recorded(recorder: Recorder | None, task: Task, site: str, rows: int):
    return _UNRECORDED if recorder is None else recorder.compute(f"{task.kind} {site}", rows, task.part)


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    """[T, C] of the tiles' [n, C]."""
    return rows[0] if len(rows) == 1 else torch.cat(rows)
