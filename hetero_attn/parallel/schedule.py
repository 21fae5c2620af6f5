"""Running a decoder's blocks in a schedule's order: one lane computes, the other sums over the ranks and norms, each as early as it can.

A decoder says what its blocks are (an attention or an MLP each), a Cut says how the step's rows are divided, order() says who goes when.
The residual stream lives in shards: of every tile a rank holds the rows it owns, adds to them and norms them, and what the others get is
the normed rows alone (TokenWeave's fused all-reduce and RMSNorm). The lanes are the communicator's: a thread beside the calling one where
tensors are on the CPU, a side stream on a device; nothing here knows which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.parallel.schedule_cut import dealt
from hetero_attn.parallel.schedule_order import EMBED, INNER, PRODUCT, Cut, Task, leaves, order
from hetero_attn.parallel.trace import Recorder, recorded


@dataclass(frozen=True)
class SumNorm:
    """What follows a sum over the ranks: the residual add and this norm. weight, post_weight [C]; as all_reduce_rms_norm takes them."""

    weight: torch.Tensor
    eps: float
    weight_offset: float = 0.0
    post_weight: torch.Tensor | None = None

    def options(self, site: str) -> dict[str, Any]:
        """all_reduce_rms_norm's arguments behind the summand and the residual."""
        return {"weight": self.weight, "eps": self.eps, "site": site, "weight_offset": self.weight_offset, "post_weight": self.post_weight}


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
    contexts: Mapping[range, Any],
    cut: Cut,
    communicator: Communicator,
    recorder: Recorder | None = None,
) -> torch.Tensor:
    """The embedded rows through all blocks -> [T, C] under the last block's norm, the same on every rank.

    embed: begins to fetch some embedded rows [t, C] of a part by the lane, and gives what waits for them. first_norm: the first block's,
    which needs no sum. contexts: what `inner` is told of each part of the cut, and of the rows that enter at a time. Every rank makes this
    call with an equal cut. Raises what a block raises, CommunicatorError, and ValueError for a cut whose exit does not suit the ranks.
    """
    if missing := [rows for rows in (*cut.parts, *cut.entering[0]) if rows not in contexts]:
        raise ValueError(f"no contexts for {missing} of a cut in {len(cut.tiles)} parts ({cut})")
    lane = CommunicationLane(communicator, recorder, asynchronous=cut.overlaps)
    coming: list[list[Callable[[], torch.Tensor]]] = [[] for _ in cut.tiles]             # of each part, its tiles' or pieces' rows
    stream, ys = _Stream(cut, communicator), []
    for task in order(len(blocks), cut):
        block, part, pieces = blocks[task.block], cut.parts[task.part], cut.entering[task.part]
        leaving = leaves(task.block, task.part, len(blocks), cut)
        if task.kind == EMBED:
            coming[task.part].append(embed(pieces[task.tile], lane))
        elif task.kind == INNER and task.block == 0:
            rows = stream.enter(task, coming[task.part].pop(0)())                            # [t, C]
            with recorded(recorder, f"{task.kind} {block.site}", len(rows), task.part):
                ys.append(block.inner(first_norm(rows), contexts[pieces[task.tile]]))
            if task.tile == len(pieces) - 1:
                y, ys = _joined(ys), []                                                      # [t, K] of the part
        elif task.kind == INNER:
            if task.tile == 0:
                rows = normed = _joined([arrive() for arrive in coming[task.part]])          # [t, C]
                coming[task.part] = []
            if leaving:
                rows = stream.leave(task, normed)
            with recorded(recorder, f"{task.kind} {block.site}", len(rows), task.part):
                y = block.inner(rows, contexts[part])                                        # [t, K]
        elif task.kind == PRODUCT:
            tile = range(part.start, part.start + len(y)) if leaving else cut.tiles[task.part][task.tile]
            with recorded(recorder, f"{task.kind} {block.site}", len(tile), task.part):
                summand = block.product(y[tile.start - part.start : tile.stop - part.start])     # [n, C]
        else:
            coming[task.part].append(lane.start(
                f"sum {block.site}", task.part, "all_reduce_rms_norm", summand, stream.residual(task, leaving),
                **block.norm.options(block.site),
            ))
    arrived = [[arrive() for arrive in part] for part in coming]
    if cut.exit and len(blocks) > 1:
        arrived[-1] = [stream.joined(arrived[-1])]
    return _joined([rows for part in arrived for rows in part])


class _Stream:
    """The residual stream in shards: of each tile the rows that this rank owns, and of the last part's pieces their share of them."""

    def __init__(self, cut: Cut, communicator: Communicator) -> None:
        self.cut, self.communicator = cut, communicator
        self.owned: dict[range, torch.Tensor] = {}
        self.embedded: list[torch.Tensor] = []
        self.pieces = dealt(cut.exit, communicator.row_counts) if cut.exit else []           # of each, a slice of the part for every rank

    def enter(self, task: Task, rows: torch.Tensor) -> torch.Tensor:
        """Embedded rows [t, C] of a piece; the last of a part begins its shards."""
        self.embedded.append(rows)
        if task.tile == len(self.cut.entering[task.part]) - 1:
            whole, begin = _joined(self.embedded), self.cut.parts[task.part].start
            self.embedded = []
            for tile in self.cut.tiles[task.part]:
                self.owned[tile] = whole[tile.start - begin : tile.stop - begin][self.communicator.rows(len(tile))].clone()
        return rows

    def leave(self, task: Task, normed: torch.Tensor) -> torch.Tensor:
        """The rows [n, C] of a piece of the last part's [t, C]."""
        return torch.cat([normed[own] for own in self.pieces[task.tile]])

    def residual(self, task: Task, leaving: bool) -> torch.Tensor:
        """This rank's rows of the residual of a tile, or of a piece that leaves."""
        owned = self.owned[self.cut.tiles[task.part][0 if leaving else task.tile]]
        if not leaving:
            return owned
        first, piece = (self.pieces[at][self.communicator.rank] for at in (0, task.tile))
        return owned[piece.start - first.start : piece.stop - first.start]

    def joined(self, rows: list[torch.Tensor]) -> torch.Tensor:
        """The last part [t, C] of its pieces [n, C]."""
        whole = rows[0].new_empty(len(self.cut.parts[-1]), *rows[0].shape[1:])
        for each, slices in zip(rows, self.pieces):
            for own, values in zip(slices, each.split([own.stop - own.start for own in slices])):
                whole[own] = values
        return whole


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
