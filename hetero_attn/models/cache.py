"""The paged KV cache, and the step it prepares: which token stands where, in one packed batch.

A sequence owns whole blocks of a fixed pool; a block table maps its positions to them. The tables are made from the calls alone (no
rank, no tensor contents enter), so ranks that run the same calls hold identical tables without talking, while each stores its own KV
heads. Prefill, chunked prefill, decode and any mixture are one thing here: `counts` new tokens for each of some sequences.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from hetero_attn.models.config import ModelError
from hetero_attn.ops import attention_varlen
from hetero_attn.parallel.offload import DeviceAccount, HostLayers, Traffic
from hetero_attn.parallel.placement import Placement, attends_on_host, runs_of
from hetero_attn.parallel.trace import Recorder
from hetero_attn.profile import DeviceProfile


class CacheFull(RuntimeError):
    """The pool has too few free blocks or sequence places for what was asked; nothing was reserved."""


@dataclass(frozen=True)
class Step:
    """One forward pass over T packed tokens of B sequences, N of whose rows want logits. The tensors live on the cache's device.

    tokens       [T] int64 or None    token ids (None on ranks that never see them: vocabulary 'master')
    positions    [T] int64            place of each token in its own sequence, from 0
    cu_seqlens_q [B+1] int32          where each sequence's new tokens begin in the packed rows
    block_table  [B, max_blocks] int32  blocks of each sequence, in order; unused entries are 0 and are never read
    seqused_k    [B] int32            keys of each sequence, the new tokens included
    slots        [T] int64            block * block_size + offset where each token's K and V are stored
    logits_at    [N] int64            rows of the packed batch that want logits
    counts, lengths   B numbers each  new tokens and keys of each sequence, as cu_seqlens_q and seqused_k have them, on the host
    asked        B numbers            new tokens of each sequence in the whole pass, of which a part may have fewer
    host         the same step with its tensors in host memory; None where these are
    """

    tokens: torch.Tensor | None
    positions: torch.Tensor
    cu_seqlens_q: torch.Tensor
    block_table: torch.Tensor
    seqused_k: torch.Tensor
    slots: torch.Tensor
    logits_at: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    asked: tuple[int, ...] = ()
    block_size: int = 1
    host: Step | None = None

    @property
    def total_q(self) -> int:
        """T, the packed tokens of this step."""
        return self.positions.shape[0]

    @property
    def on_host(self) -> Step:
        """This step with its tensors in host memory."""
        return self.host or self

    def to(self, device: torch.device) -> Step:
        """This step, which is on the host, with its tensors on the device."""
        if device.type == "cpu":
            return self
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved, host=self)

    def part(self, rows: range) -> Step:
        """Those rows of the packed batch as a step of their own, without tokens and logits.

        A sequence that begins before them has its earlier keys in the cache by the time this runs, or waits for the parts that put them
        there; one that goes on after them is seen up to their last token. So attention over the parts in order is attention over the step.
        """
        kept, counts, lengths, begin = [], [], [], 0
        host = None if self.host is None else self.host.part(rows)
        for sequence, (count, length) in enumerate(zip(self.counts, self.lengths)):
            end = begin + count
            first, last = max(begin, rows.start), min(end, rows.stop)
            if first < last:
                kept.append(sequence)
                counts.append(last - first)
                lengths.append(length - (end - last))
            begin = end
        device = self.positions.device
        return Step(
            tokens=None,
            positions=self.positions[rows.start : rows.stop],
            cu_seqlens_q=torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device),
            block_table=self.block_table[kept[0] : kept[-1] + 1],
            seqused_k=torch.tensor(lengths, dtype=torch.int32, device=device),
            slots=self.slots[rows.start : rows.stop],
            logits_at=self.logits_at[:0],
            max_seqlen_q=max(counts),
            max_seqlen_k=max(lengths),
            counts=tuple(counts),
            lengths=tuple(lengths),
            asked=tuple(self.asked[each] for each in kept),
            block_size=self.block_size,
            host=host,
        )

    # ---- for layers whose KV lies in host memory (hetero_attn/parallel/offload.py) --------------------------------------

    @cached_property
    def near(self) -> tuple[int, ...]:
        """The sequences (places in this step) that the host's processor attends there."""
        return tuple(place for place, count in enumerate(self.asked) if attends_on_host(count))

    @cached_property
    def far(self) -> tuple[int, ...]:
        """The others, which the device attends."""
        return tuple(place for place, count in enumerate(self.asked) if not attends_on_host(count))

    def among(self, sequences: tuple[int, ...]) -> tuple[torch.Tensor, Step]:
        """Those sequences' rows of the packed batch, and the step of them alone."""
        if sequences not in self._among:
            ends = list(itertools.accumulate(self.counts))
            rows = [row for each in sequences for row in range(ends[each] - self.counts[each], ends[each])]
            counts, lengths = [self.counts[each] for each in sequences], [self.lengths[each] for each in sequences]
            device, chosen = self.positions.device, torch.tensor(rows, device=self.positions.device)
            own = replace(
                self, tokens=None, positions=self.positions[chosen], slots=self.slots[chosen], logits_at=self.logits_at[:0],
                cu_seqlens_q=torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device),
                block_table=self.block_table[list(sequences)], seqused_k=self.seqused_k[list(sequences)], max_seqlen_q=max(counts),
                max_seqlen_k=max(lengths), counts=tuple(counts), lengths=tuple(lengths),
                asked=tuple(self.asked[each] for each in sequences),
                host=None if self.host is None else self.host.among(sequences)[1],
            )
            self._among[sequences] = chosen, own
        return self._among[sequences]

    @cached_property
    def _among(self) -> dict[tuple[int, ...], tuple[torch.Tensor, Step]]:
        return {}                                              # asked for anew by every layer

    @cached_property
    def touched(self) -> list[range]:
        """The blocks that this step's tokens lie in, as runs."""
        return runs_of(self.on_host.slots.div(self.block_size, rounding_mode="floor").unique().tolist())

    def held(self, window: int | None = None) -> list[range]:
        """The blocks of earlier tokens that the far sequences' tokens see in a layer of that window, as runs."""
        blocks = []
        for each in self.far:
            past = self.lengths[each] - self.counts[each]
            first = 0 if window is None else max(0, past - window + 1)
            if first < past:
                blocks += self.on_host.block_table[each, first // self.block_size : -(-past // self.block_size)].tolist()
        return runs_of(sorted(blocks))


class PagedCache:
    """Pages k[layer], v[layer] of [num_blocks, block_size, kv_heads, head_dim], and the sequences that own them.

    `kv_heads` is this rank's number. Windowed layers share the table (their old blocks are kept). Pages are not cleared: attention
    never reads past a sequence's length. placement: the layers whose pages lie in host memory (None: none); account: what the others are
    taken from; windows, host_profile, traffic: as HostLayers has them, which is `offloaded` (None: no such layer).
    """

    def __init__(
        self,
        *,
        layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        max_sequences: int,
        context_length: int,
        placement: Placement | None = None,
        account: DeviceAccount | None = None,
        windows: Sequence[int | None] = (),
        host_profile: DeviceProfile | None = None,
        traffic: Traffic | None = None,
    ):
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size), ("max_sequences", max_sequences)):
            if value < 1:
                raise ValueError(f"PagedCache: {name} is {value}, expected at least 1")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.max_sequences, self.context_length = max_sequences, context_length
        self.device = torch.device(device)
        self.placement, account = placement or Placement(layers), account or DeviceAccount()
        shape, self.offloaded = (num_blocks, block_size, kv_heads, head_dim), None
        if self.placement.host:
            self.offloaded = HostLayers(self.placement, shape, dtype, self.device, account=account, windows=windows,
                                        profile=host_profile, traffic=traffic)
        on_host = set(self.placement.host)
        self.k, self.v = ([pages[layer] if layer in on_host else account.empty(shape, dtype, self.device) for layer in range(layers)]
                          for pages in ((self.offloaded.k, self.offloaded.v) if self.offloaded else ({}, {})))
        self._free = list(range(num_blocks - 1, -1, -1))          # popped from the end: block 0 goes first
        self._blocks: dict[int, array[int]] = {}                  # sequence id -> its blocks, in order; C ints, copied whole into tables
        self._lengths: dict[int, int] = {}
        self._next_id = 0

    @staticmethod
    def blocks_for(max_tokens: int, max_sequences: int, block_size: int) -> int:
        """Blocks that hold `max_tokens` however they are spread over up to `max_sequences` sequences."""
        return max(1, max_tokens // block_size + min(max_sequences, max_tokens))      # each sequence may waste part of one block

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Ids of the sequences in the cache, oldest first."""
        return tuple(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's pages, over all layers."""
        return sum(pages.numel() * pages.element_size() for pages in (*self.k, *self.v))

    def add_sequence(self) -> int:
        """A new, empty sequence's id. Raises CacheFull when max_sequences are in the cache already."""
        if len(self._lengths) >= self.max_sequences:
            raise CacheFull(f"the cache holds {len(self._lengths)} sequences of max_sequences={self.max_sequences}; "
                            "free one, or make the cache with a larger max_sequences")
        sequence, self._next_id = self._next_id, self._next_id + 1
        self._blocks[sequence], self._lengths[sequence] = array("i"), 0
        return sequence

    def free(self, sequence: int) -> None:
        """Gives the sequence's blocks back to the pool; its id is not used again."""
        self._known(sequence)
        self._free.extend(reversed(self._blocks.pop(sequence)))
        del self._lengths[sequence]

    def length(self, sequence: int) -> int:
        """Tokens of the sequence that have a place in the cache."""
        self._known(sequence)
        return self._lengths[sequence]

    def step(
        self,
        ids: Sequence[int],
        counts: Sequence[int],
        tokens: torch.Tensor | Sequence[int] | None = None,
        last_only: bool = True,
    ) -> Step:
        """Reserves places for counts[i] >= 1 further tokens of sequence ids[i] and describes the forward pass that fills them.

        tokens: sum(counts) token ids, packed in the order of ids, or None on a rank that never sees them. last_only: logits for the
        last new token of each sequence, else for all T rows. Raises CacheFull (nothing is reserved then), ModelError for a position
        beyond the model's context, ValueError for ids or counts that make no sense. The forward pass must follow: the places count
        as filled from now on.
        """
        ids, counts = list(ids), [int(count) for count in counts]
        if len(ids) != len(counts) or len(set(ids)) != len(ids) or not ids:
            raise ValueError(f"step: expected as many counts as ids, each id once and at least one; got ids {ids}, counts {counts}")
        if min(counts) < 1:
            raise ValueError(f"step: counts must be at least 1, got {counts}; leave sequences without new tokens out")
        total = sum(counts)
        if tokens is not None:
            tokens = torch.as_tensor(tokens, dtype=torch.int64).to("cpu")
            if tokens.shape != (total,):
                raise ValueError(f"step: tokens have shape {list(tokens.shape)}, counts {counts} ask for [{total}]")
        self._reserve(ids, counts)

        positions, slots, cu_seqlens = [], [], [0]
        for sequence, count in zip(ids, counts):
            blocks, end = self._blocks[sequence], self._lengths[sequence]
            positions.extend(range(end - count, end))
            slots.extend(blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(end - count, end))
            cu_seqlens.append(cu_seqlens[-1] + count)
        lengths = [self._lengths[sequence] for sequence in ids]
        width = max(len(self._blocks[sequence]) for sequence in ids)
        table = torch.zeros(len(ids), width, dtype=torch.int32)
        for row, sequence in zip(table, ids):
            row[:len(self._blocks[sequence])] = torch.frombuffer(self._blocks[sequence], dtype=torch.int32)
        return Step(
            tokens=tokens,
            positions=torch.tensor(positions, dtype=torch.int64),
            cu_seqlens_q=torch.tensor(cu_seqlens, dtype=torch.int32),
            block_table=table,
            seqused_k=torch.tensor(lengths, dtype=torch.int32),
            slots=torch.tensor(slots, dtype=torch.int64),
            logits_at=torch.tensor([end - 1 for end in cu_seqlens[1:]] if last_only else range(total), dtype=torch.int64),
            max_seqlen_q=max(counts),
            max_seqlen_k=max(lengths),
            counts=tuple(counts),
            lengths=tuple(lengths),
            asked=tuple(counts),
            block_size=self.block_size,
        ).to(self.device)

    def running(self, step: Step, recorder: Recorder | None = None) -> AbstractContextManager:
        """Around a forward pass of the whole step, layer after layer: what lies on the host is fetched ahead. recorder: takes that down."""
        return nullcontext() if self.offloaded is None else self.offloaded.running(step, recorder)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, **options: Any) -> torch.Tensor:
        """Stores k, v [T, kv_heads, head_dim] of the step's tokens, and attends with q [T, q_heads, head_dim] over their sequences' pages
        -> [T, q_heads, head_dim]. options: attention_varlen's."""
        if self.offloaded is not None and layer in self.offloaded.k:
            return self.offloaded.attend(layer, q, k, v, step, options)
        self.write(layer, k, v, step.slots)
        return attention_varlen(
            q, self.k[layer], self.v[layer], step.cu_seqlens_q, None, step.max_seqlen_q, step.max_seqlen_k,
            block_table=step.block_table, seqused_k=step.seqused_k, **options,
        )

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Stores k, v [T, kv_heads, head_dim] of this step's tokens at slots [T]."""
        self.k[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.v[layer].flatten(0, 1).index_copy_(0, slots, v)

    def _reserve(self, ids: list[int], counts: list[int]) -> None:
        wanted = []
        for sequence, count in zip(ids, counts):
            length = self.length(sequence) + count
            if length > self.context_length:
                raise ModelError(f"a sequence of {length} tokens is longer than the model's context of {self.context_length} tokens; "
                                 "shorten the prompt or ask for fewer new tokens")
            wanted.append(-(-length // self.block_size) - len(self._blocks[sequence]))
        if sum(wanted) > len(self._free):
            raise CacheFull(
                f"{sum(counts)} more tokens for {len(ids)} sequences need {sum(wanted)} blocks of {self.block_size} tokens, "
                f"{len(self._free)} of {self.num_blocks} are free; free sequences, or make the cache with a larger max_tokens"
            )
        for sequence, count, blocks in zip(ids, counts, wanted):
            self._blocks[sequence].extend(self._free.pop() for _ in range(blocks))
            self._lengths[sequence] += count

    def _known(self, sequence: int) -> None:
        if sequence not in self._lengths:
            raise ValueError(f"sequence {sequence} is not in the cache, which holds {sorted(self._lengths)}")
