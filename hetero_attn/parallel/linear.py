"""Linear layers, embedding and head of a tensor-parallel decoder: each holds its rank's slice and says which slice that is.

A column-parallel layer makes a rank's own features and needs no communication; a row-parallel layer sums over all ranks' features: there
is the all-reduce (longer steps run it from schedule.py, beside the products). Shards may be uneven, or empty. Products are made by each
layer's `linear`, torch's own until the decoder puts its backend's there; the row-parallel ones by the communicator's, together with the
sum, because a device may fuse the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from hetero_attn import host_memory
from hetero_attn.communicator import Communicator
from hetero_attn.parallel.sharding import Partition, Shard, split
from hetero_attn.product import linear

if TYPE_CHECKING:
    from hetero_attn.parallel.window import Lent

WIDENED_ROWS = 256              # rows of a weight that are widened at a time, where it is stored in another dtype than it is used in


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """A parameter without values and without gradient, to be filled from a checkpoint."""
    return nn.Parameter(host_memory.empty(shape, dtype, device), requires_grad=False)


def product(
    linear: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """linear(x [T, K], weight [N, K], bias [N]) -> [T, N] for a weight from the window, which is held in the dtype it is stored in."""
    if weight.dtype == x.dtype:
        return linear(x, weight, bias, out=out)
    out = x.new_empty(*x.shape[:-1], weight.shape[0]) if out is None else out
    for start in range(0, weight.shape[0], WIDENED_ROWS):
        rows = slice(start, start + WIDENED_ROWS)
        out[..., rows] = linear(x, weight[rows].to(x.dtype), None if bias is None else bias[rows])
    return out


def streamed_product(
    linear: Callable[..., torch.Tensor], x: torch.Tensor, streamed: Sequence[Lent], bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """linear(x [T, K], weight [N, K], bias [N]) -> [T, N] for a weight that the window lends in runs of rows."""
    made, first = [], 0
    for lent in streamed:
        with lent as (weight,):
            rows = slice(first, first + weight.shape[0])
            own = None if bias is None else bias[rows]
            if len(streamed) == 1:
                return product(linear, x, weight, own, out=out)
            if out is None:
                made.append(product(linear, x, weight, own))
            else:
                out[..., rows] = product(linear, x, weight, own)
            first = rows.stop
    return torch.cat(made, dim=-1) if out is None else out


class ColumnParallelLinear(nn.Module):
    """One or more projections of the same input, each cut by output features, kept as one weight so that they are one product.

    parts: (name in the checkpoint, whole output features, this rank's) of each projection, for example q_proj, k_proj, v_proj.
    """

    linear = staticmethod(linear)
    streamed: Sequence[Lent] | None = None       # lends the weight for each product, where it is not held (parallel/window.py)

    def __init__(
        self,
        in_features: int,
        parts: Sequence[tuple[str, int, range]],
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        super().__init__()
        self.in_features, self.parts = in_features, tuple(parts)
        self.sizes = [len(own) for _, _, own in self.parts]
        self.weight = empty_parameter(sum(self.sizes), in_features, dtype=dtype, device=device)          # [own features, in]
        self.bias = empty_parameter(sum(self.sizes), dtype=dtype, device=device) if bias else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [T, in] -> [T, own features] of each part."""
        return self.joined(x).split(self.sizes, dim=-1)

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, own features of all parts], side by side as one product makes them."""
        if self.streamed is None:
            return self.linear(x, self.weight, self.bias)
        return streamed_product(self.linear, x, self.streamed, self.bias)

    def shards(self, prefix: str) -> Iterator[Shard]:
        for index, (name, out_features, own) in enumerate(self.parts):
            yield Shard(f"{prefix}{name}.weight", (out_features, self.in_features), (own,), self.weight.split(self.sizes)[index])
            if self.bias is not None:
                yield Shard(f"{prefix}{name}.bias", (out_features,), (own,), self.bias.split(self.sizes)[index])


class RowParallelLinear(nn.Module):
    """A projection cut by input features: every rank has a partial sum of all outputs. The bias is held, and added, by rank 0 alone."""

    linear = staticmethod(linear)
    streamed: Sequence[Lent] | None = None

    def __init__(
        self,
        communicator: Communicator,
        name: str,
        in_features: int,
        out_features: int,
        own: range,
        *,
        site: str,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        super().__init__()
        self.communicator, self.name, self.site = communicator, name, site
        self.in_features, self.out_features, self.own = in_features, out_features, own
        self.weight = empty_parameter(out_features, len(own), dtype=dtype, device=device)                # [out, own features]
        self.bias = empty_parameter(out_features, dtype=dtype, device=device) if bias and communicator.rank == 0 else None

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, own features] -> this rank's summand [T, out], made where the collectives take it without a copy: for schedules."""
        out = self.communicator.empty((*x.shape[:-1], self.out_features), x.dtype)                      # [T, out]
        if self.streamed is None:
            self.linear(x, self.weight, self.bias, out=out)
            return out
        return streamed_product(self.linear, x, self.streamed, self.bias, out=out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, own features] -> [T, out], the same on every rank: all_reduce(partial(x)), which a device may fuse."""
        if self.streamed is not None:            # the weight's memory is free again before the sum, and the next weights load meanwhile
            return self.communicator.all_reduce(self.partial(x), site=self.site)
        return self.communicator.linear_all_reduce(x, self.weight, self.bias, site=self.site)

    def shards(self, prefix: str) -> Iterator[Shard]:
        shape = (self.out_features, self.in_features)
        yield Shard(f"{prefix}{self.name}.weight", shape, (range(self.out_features), self.own), self.weight)
        if self.bias is not None:
            yield Shard(f"{prefix}{self.name}.bias", (self.out_features,), (), self.bias)


class VocabularyEmbedding(nn.Module):
    """Token ids to hidden states: rows over all ranks and summed ('sharded'), or looked up by rank 0 and broadcast ('master').

    `table`, where the rows are not held, looks them up: (indices [T] int64 into this rank's rows) -> [T, C].
    """

    table: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __init__(
        self, communicator: Communicator, vocab_size: int, hidden_size: int, partition: Partition, *,
        dtype: torch.dtype, device: torch.device | str, site: str = "embed",
    ):
        super().__init__()
        self.communicator, self.site = communicator, site
        self.vocab_size, self.own, self.vocabulary = vocab_size, partition.vocab, partition.vocabulary
        self.weight = empty_parameter(len(self.own), hidden_size, dtype=dtype, device=device)            # [own rows, C]

    def forward(self, tokens: torch.Tensor | None, total: int) -> torch.Tensor:
        """tokens [T] int64 (may be None where no rows are held under 'master'), total = T -> hidden states [T, C] on every rank."""
        hidden = self.local(tokens, total)
        if self.vocabulary == "master":
            return self.communicator.broadcast(hidden, 0, site=self.site)
        return hidden if self.communicator.world_size == 1 else self.communicator.all_reduce(hidden, site=self.site)

    @property
    def operation(self) -> str:
        """What makes hidden states of every rank's local()."""
        return "broadcast" if self.vocabulary == "master" else "all_reduce"

    def local(self, tokens: torch.Tensor | None, total: int) -> torch.Tensor:
        """This rank's part in the hidden states [T, C]: a summand, or under 'master' all of them on rank 0 and room for them elsewhere."""
        if self.vocabulary == "master" and self.communicator.rank != 0:
            return self.communicator.empty((total, self.weight.shape[1]), self.weight.dtype)
        self._check(tokens, total)
        if self.vocabulary == "master" or self.communicator.world_size == 1:
            return self.rows(tokens)
        hidden = torch.zeros(total, self.weight.shape[1], dtype=self.weight.dtype, device=tokens.device)
        if len(self.own):
            mine = (tokens >= self.own.start) & (tokens < self.own.stop)
            rows = self.rows((tokens - self.own.start).clamp(0, len(self.own) - 1))
            hidden = torch.where(mine[:, None], rows, hidden)
        return hidden

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """indices [T] into this rank's rows -> [T, C]."""
        return F.embedding(indices, self.weight) if self.table is None else self.table(indices)

    def shards(self, prefix: str) -> Iterator[Shard]:
        if len(self.own):
            yield Shard(f"{prefix}.weight", (self.vocab_size, self.weight.shape[1]), (self.own,), self.weight)

    def _check(self, tokens: torch.Tensor | None, total: int) -> None:
        if tokens is None:
            raise ValueError(f"rank {self.communicator.rank} needs this step's token ids (vocabulary is {self.vocabulary!r}), got None")
        # a device tensor is not synchronised for a check
        if tokens.device.type == "cpu" and total and not (0 <= int(tokens.min()) and int(tokens.max()) < self.vocab_size):
            raise ValueError(f"token ids from {int(tokens.min())} to {int(tokens.max())}, the vocabulary has 0 to {self.vocab_size - 1}")


class VocabularyHead(nn.Module):
    """Hidden states to logits, in fp32: columns gathered over all ranks ('sharded'), or made by rank 0 alone ('master').

    `tied` shares the embedding's weight, which is cut in the same way. `streamed`, where the weight is not held, lends it in runs of rows.
    """

    linear = staticmethod(linear)
    streamed: Sequence[Lent] | None = None

    def __init__(
        self, communicator: Communicator, vocab_size: int, hidden_size: int, partition: Partition, *,
        tied: VocabularyEmbedding | None = None, dtype: torch.dtype, device: torch.device | str, site: str = "lm_head",
    ):
        super().__init__()
        self.communicator, self.site = communicator, site
        self.vocab_size, self.own, self.vocabulary = vocab_size, partition.vocab, partition.vocabulary
        # columns of every rank
        self.sizes = list(partition.vocab_counts) or [len(own) for own in split(vocab_size, partition.world_size)]
        self.tied = tied is not None
        self.weight = tied.weight if tied else empty_parameter(len(self.own), hidden_size, dtype=dtype, device=device)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """hidden [N, C] -> logits [N, vocab] fp32; None on the workers under 'master'."""
        if self.vocabulary == "master":
            return self.columns(hidden).float() if self.communicator.rank == 0 else None
        if not len(hidden):
            return hidden.new_empty(0, self.vocab_size, dtype=torch.float32)
        return self.communicator.all_gather(self.columns(hidden), dim=1, sizes=self.sizes, site=self.site).float()

    def columns(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, C] -> this rank's logits [N, own rows]."""
        if self.streamed is None:
            return self.linear(hidden, self.weight)
        return streamed_product(self.linear, hidden, self.streamed)

    def shards(self, prefix: str) -> Iterator[Shard]:
        if len(self.own) and not self.tied:
            yield Shard(f"{prefix}.weight", (self.vocab_size, self.weight.shape[1]), (self.own,), self.weight)
