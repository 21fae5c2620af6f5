"""Rank 0 drives, the other ranks follow: each change of the cache and each step is announced by one control record.

A record is a few integers: what to do, which sequences, how many new tokens each. Token ids are in it only under vocabulary 'sharded',
where every rank embeds its part; under 'master' they stay on rank 0. Cache and Step are made from these integers alone, so following
the records gives every rank the same tables. Between records a worker waits without a time limit (rank 0 may be waiting for a person);
within a step every wait is bounded.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from hetero_attn.communicator import CommunicatorError
from hetero_attn.models.cache import PagedCache

STOP, NEW_CACHE, ADD, FREE, STEP = range(5)
HEADER_WORDS = 64               # int64: code, words of the body, and as much of the body as fits; a decode step fits whole
SITE = "control"


class Driver:
    """Rank 0's hand on the model: the same few calls as on a cache and a decoder, made on every rank at once.

    A context manager; leaving it releases the workers, whatever happened inside. When a step broke off half-way (a lost rank, an
    error in the model) the ranks are no longer in step and no message can reach them: it is `broken`, and closing it closes the
    communicator, which ends their waits with an error.
    """

    def __init__(self, model):
        if model.communicator.rank != 0:
            raise ValueError(f"rank {model.communicator.rank} cannot drive, only rank 0 can; the others call serve(model)")
        self.model, self.communicator = model, model.communicator
        self.cache: PagedCache | None = None
        self._closed = self.broken = False

    def new_cache(self, max_tokens: int, max_sequences: int) -> PagedCache:
        """Replaces the cache on every rank by an empty one."""
        self.cache = None                                       # the old pages go first
        with self._announced(NEW_CACHE, [max_tokens, max_sequences]):
            self.cache = self.model.new_cache(max_tokens, max_sequences)
        return self.cache

    def add_sequence(self) -> int:
        """A new sequence's id. Raises CacheFull."""
        sequence = self.cache.add_sequence()
        with self._announced(ADD, []):
            return sequence

    def free(self, sequence: int) -> None:
        """Gives a sequence's blocks back, on every rank."""
        self.cache.free(sequence)
        with self._announced(FREE, [sequence]):
            pass

    def forward(self, ids: Sequence[int], counts: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Runs counts[i] new tokens of sequence ids[i], packed in `tokens` -> logits [len(ids), vocab] fp32 after each one's last.

        Raises CacheFull or ModelError before anything is sent, CommunicatorError when a rank is lost.
        """
        step = self.cache.step(ids, counts, tokens)
        body = [len(ids), *ids, *counts, *(tokens if self.model.vocabulary == "sharded" else ())]
        with self._announced(STEP, body):
            return self.model(step, self.cache)

    def raise_if_broken(self) -> None:
        """To be asked when results have been read: on a device a lost rank is known only once its kernels are done. Raises
        CommunicatorError."""
        try:
            self.communicator.raise_if_broken()
        except CommunicatorError:
            self.broken = self.communicator.world_size > 1
            raise

    def close(self) -> None:
        """Releases the workers: their serve() returns. May be called twice."""
        if self._closed:
            return
        self._closed, self.cache = True, None
        if self.broken:
            self.communicator.close()
        else:
            with self._announced(STOP, []):
                pass

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def _announced(self, code: int, body: list[int]) -> Iterator[None]:
        """Sends the record and does the work in the block, not to be split by Ctrl-C; any exception in between breaks the group."""
        if self.broken:
            raise RuntimeError("an earlier step broke off, the ranks are no longer in step; start the group anew")
        with interrupts_deferred():
            try:
                send(self.communicator, self.model.device, code, body)
                yield
            except BaseException:
                self.broken = self.communicator.world_size > 1
                raise


def serve(model) -> None:
    """A worker's whole part in generation: follows rank 0's records until it is told to stop.

    Raises CommunicatorError when rank 0 or another rank is lost.
    """
    cache: PagedCache | None = None
    while True:
        code, body = receive(model.communicator, model.device)
        if code == STOP:
            model.communicator.raise_if_broken()                # the last step's kernels are done: the record has been read
            return
        if code == NEW_CACHE:
            cache = None
            cache = model.new_cache(*body)
        elif code == ADD:
            cache.add_sequence()
        elif code == FREE:
            cache.free(*body)
        elif code == STEP:
            sequences = body[0]
            ids, counts, tokens = body[1 : 1 + sequences], body[1 + sequences : 1 + 2 * sequences], body[1 + 2 * sequences :]
            model(cache.step(ids, counts, tokens if model.vocabulary == "sharded" else None), cache)
        else:
            raise RuntimeError(f"rank {model.communicator.rank} received control record {code}, which it does not know; "
                               "do all ranks run the same version?")


def send(communicator, device: torch.device, code: int, body: Sequence[int]) -> None:
    """Rank 0's half of a record: a header of fixed size, then the words of a body that did not fit into it."""
    if communicator.world_size == 1:
        return
    words = [code, len(body), *body]
    communicator.await_signal(0, site=SITE)
    head = words[:HEADER_WORDS] + [0] * (HEADER_WORDS - len(words))
    communicator.broadcast(torch.tensor(head, dtype=torch.int64, device=device), 0, site=SITE)
    if len(words) > HEADER_WORDS:
        communicator.broadcast(torch.tensor(words[HEADER_WORDS:], dtype=torch.int64, device=device), 0, site=SITE)


def receive(communicator, device: torch.device) -> tuple[int, list[int]]:
    """A worker's half: (code, body). Waits for the header as long as rank 0 lives."""
    communicator.await_signal(0, site=SITE)
    header = torch.empty(HEADER_WORDS, dtype=torch.int64, device=device)
    code, size, *body = communicator.broadcast(header, 0, site=SITE).tolist()
    if size > len(body):
        rest = torch.empty(size - len(body), dtype=torch.int64, device=device)
        body += communicator.broadcast(rest, 0, site=SITE).tolist()
    return code, body[:size]


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Holds a first Ctrl-C back until the block is done: half a step would leave the other ranks waiting. A second one counts at once."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    arrived = []

    def remember(number, frame):
        arrived.append(number)
        if len(arrived) > 1:
            previous(number, frame)

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if arrived:
        previous(arrived[0], None)
