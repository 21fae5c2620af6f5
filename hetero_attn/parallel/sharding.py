"""Which heads, FFN columns and vocabulary rows a rank owns: pure Python, the same answer on every rank.

Any world size up to the number of query heads is served, evenly or not. Whole KV groups (a KV head with its query heads) go to a rank
while there are enough; beyond that, KV heads are replicated and the query heads of one group are divided over the ranks that hold it.
So a rank always sees a plain GQA shape: q_heads % kv_heads == 0, and one attention call a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VOCABULARIES = ("sharded", "master")


def split(total: int, parts: int) -> list[range]:
    """range(total) in `parts` consecutive ranges, of which the first total % parts are one longer; some are empty if parts > total."""
    if total < 0 or parts < 1:
        raise ValueError(f"split: total is {total} and parts is {parts}, expected total >= 0 and parts >= 1")
    size, longer = divmod(total, parts)
    ends = [part * size + min(part, longer) for part in range(parts + 1)]
    return [range(begin, end) for begin, end in pairwise(ends)]


def split_heads(q_heads: int, kv_heads: int, world_size: int) -> list[tuple[range, range]]:
    """(query heads, KV heads) of every rank. Raises ValueError when there are more ranks than query heads."""
    if q_heads < 1 or kv_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"{q_heads} query heads are not a multiple of {kv_heads} KV heads")
    if not 1 <= world_size <= q_heads:
        raise ValueError(f"tensor parallel size {world_size} is not possible for a model of {q_heads} query heads; "
                         f"sizes that work: 1 to {q_heads}")
    group = q_heads // kv_heads
    if world_size <= kv_heads:
        return [(range(kv.start * group, kv.stop * group), kv) for kv in split(kv_heads, world_size)]
    heads = []
    for kv_head, ranks in enumerate(split(world_size, kv_heads)):
        first = kv_head * group
        heads += [(range(first + q.start, first + q.stop), range(kv_head, kv_head + 1)) for q in split(group, len(ranks))]
    return heads


@dataclass(frozen=True)
class Partition:
    """One rank's part of every layer. The ranges index the whole model's heads, FFN columns and vocabulary rows.

    `vocabulary` is 'sharded' (embedding and head over all ranks) or 'master' (both on rank 0 alone, the other ranges are empty).
    vocab_counts: the vocabulary rows of every rank where they are uneven, () = split() evenly.
    """

    rank: int
    world_size: int
    vocabulary: str
    q_heads: range
    kv_heads: range
    ffn: range
    vocab: range
    vocab_counts: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[range, range, range, range]:
        """The four ranges."""
        return self.q_heads, self.kv_heads, self.ffn, self.vocab

    @classmethod
    def of(cls, rank: int, world_size: int, *, q_heads: int, kv_heads: int, ffn: int, vocab: int, vocabulary: str = "sharded") -> Partition:
        """The part of `rank`. Raises ValueError for an impossible world size (its text lists those that work) or vocabulary."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1}")
        if vocabulary not in VOCABULARIES:
            raise ValueError(f"vocabulary is {vocabulary!r}, expected one of {', '.join(VOCABULARIES)}")
        own_q, own_kv = split_heads(q_heads, kv_heads, world_size)[rank]
        if vocabulary == "sharded":
            own_vocab = split(vocab, world_size)[rank]
        else:
            own_vocab = range(vocab) if rank == 0 else range(0)
        return cls(rank, world_size, vocabulary, own_q, own_kv, split(ffn, world_size)[rank], own_vocab)


def features(heads: range, head_dim: int) -> range:
    """The rows of a projection's weight that belong to these heads."""
    return range(heads.start * head_dim, heads.stop * head_dim)


@dataclass(frozen=True)
class Shard:
    """A slice of one checkpoint tensor and the memory it goes to.

    name   the tensor in the checkpoint
    shape  the whole tensor's shape, which the checkpoint must have
    own    the slice, a range a dimension (fewer: the further dimensions are whole)
    into   the destination, shaped like the slice, of any dtype and device
    """

    name: str
    shape: tuple[int, ...]
    own: tuple[range, ...]
    into: torch.Tensor

    @property
    def index(self) -> tuple[slice, ...]:
        """`own` as it indexes a tensor, whole trailing dimensions left out."""
        return tuple(slice(part.start, part.stop) for part in self.own)
