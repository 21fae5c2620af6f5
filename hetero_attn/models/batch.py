"""Which tokens run in the next step: sequences wait for room in the cache, prefill in chunks, and decode together.

A sequence is let in only when the cache can hold it to its end, so nothing is ever thrown out half-way; the others wait in order. Every
step holds one token of each decoding sequence and, beside them, at most `prefill_chunk` prompt tokens: a long prompt does not stop the
others from producing text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from hetero_attn.models.control import Driver
from hetero_attn.models.sampling import SamplingParams, sample, sequence_generator


@dataclass
class Sequence:
    """One request on its way. `prompt` and `output` are token ids; the first `cached` of both together are in the cache.

    limit: most new tokens it may get. cache_id, cached: a place in the cache that it has already (a conversation's); keep: leave it
    there at the end.
    """

    index: int
    prompt: list[int]
    params: SamplingParams
    limit: int
    cache_id: int | None = None
    cached: int = 0
    keep: bool = False
    output: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None

    def __post_init__(self):
        if not self.params.greedy:
            self.generator = sequence_generator(self.params.seed, self.index)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def final_length(self) -> int:
        """Most tokens it can have in the cache; the last new token is never run."""
        return len(self.prompt) + max(self.limit, 1) - 1

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens start to stop of prompt and output together."""
        joint = len(self.prompt)
        return self.prompt[start:stop] + self.output[max(start - joint, 0) : max(stop - joint, 0)]


class Batch:
    """Sequences that run together on the driver's cache. `step` until `done`; `finish` those that have ended."""

    def __init__(self, driver: Driver, sequences: Iterable[Sequence], *, max_batch: int, prefill_chunk: int):
        self._driver, self._max_batch, self._prefill_chunk = driver, max_batch, prefill_chunk
        self._waiting = deque(sequences)
        self._active: list[Sequence] = []

    @property
    def done(self) -> bool:
        return not self._waiting and not self._active

    def step(self) -> list[Sequence]:
        """Runs one forward pass; the sequences returned got a further token, output[-1]."""
        self._admit()
        planned = self._plan()
        logits = self._driver.forward(
            [sequence.cache_id for sequence, _ in planned],
            [count for _, count in planned],
            [token for sequence, count in planned for token in sequence.tokens(sequence.cached, sequence.cached + count)],
        )                                                                                             # [len(planned), vocab]
        advanced, drawn = [], []
        try:
            for row, (sequence, count) in enumerate(planned):
                sequence.cached += count
                if sequence.cached == sequence.length:
                    history = () if sequence.params.repetition_penalty == 1.0 else sequence.prompt + sequence.output
                    drawn.append(sample(logits[row], sequence.params, history, sequence.generator))
                    advanced.append(sequence)
        finally:                                     # the logits have been read, and may be what a rank that was lost has left
            self._driver.raise_if_broken()
        for sequence, token in zip(advanced, drawn):
            sequence.output.append(token)
        return advanced

    def finish(self, sequence: Sequence) -> None:
        """Takes an ended sequence out, and its tokens out of the cache unless they are to be kept."""
        self._active.remove(sequence)
        if not sequence.keep:
            self._driver.free(sequence.cache_id)
            sequence.cache_id = None

    def _blocks(self, sequence: Sequence) -> int:
        return -(-sequence.final_length // self._driver.cache.block_size)

    def _admit(self) -> None:
        free = self._driver.cache.num_blocks - sum(map(self._blocks, self._active))
        while self._waiting and len(self._active) < self._max_batch and self._blocks(self._waiting[0]) <= free:
            sequence = self._waiting.popleft()
            if sequence.cache_id is None:
                sequence.cache_id = self._driver.add_sequence()
            free -= self._blocks(sequence)
            self._active.append(sequence)
        if not self._active:
            raise RuntimeError(f"a sequence of up to {self._waiting[0].final_length} tokens waits for a cache of "
                               f"{self._driver.cache.num_blocks} blocks of {self._driver.cache.block_size} tokens: it can never hold it")

    def _plan(self) -> list[tuple[Sequence, int]]:
        """(sequence, new tokens to run), oldest first; a sequence whose prompt is not its turn yet is left out."""
        room, planned = self._prefill_chunk, []
        for sequence in self._active:
            count = sequence.length - sequence.cached
            if count > 1:                                                      # still in its prompt, or run again after a restart
                count = min(count, room)
                room -= count
            if count:
                planned.append((sequence, count))
        return planned
