"""The weight window: a model's slices come from the disk as they are needed, cyclically over all tokens, into memory that is used again.

A piece is some rows of one weight of this rank (q, k, v, o, gate, up, down, the head): a part of a block of TPI-LLM, so that memory is
free again sooner and a small window will do. Reader threads fill a ring of bytes as far ahead as it has room; whoever multiplies takes a
piece, waits if it is not there yet, and gives it back as soon as the product is made: before the all-reduce, so that loads hide behind that
too. Some pieces may stay (`resident`). Pieces are meant to be taken in order; any other order is right as well, and only slow.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from hetero_attn.parallel.disk import ALIGN, CHUNK, DiskReader, Extent, buffer, chunks, joined

READERS = 2                     # threads: one read is under way while another is handed over
STUCK_S = 600.0                 # a disk that gives nothing for so long is reported, not waited for


class WindowError(RuntimeError):
    """A piece that cannot be loaded: a file that has changed, ended or does not answer. One line."""


@dataclass(frozen=True)
class Tensor:
    """One weight in a piece: byte offset, shape and dtype as stored."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Piece:
    """What is loaded, kept and given back together. `checks`: (offset, bytes, sha256 hex) of parts, compared on the first load.
    ends_block: a sum between ranks follows."""

    name: str                                       # "layers.3.mlp.gate_up_proj.1024": from that row on
    tensors: tuple[Tensor, ...]
    extents: tuple[Extent, ...]
    checks: tuple[tuple[int, int, str], ...] = ()
    ends_block: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in the ring: whole pages."""
        end = max((each.offset + each.dtype.itemsize * torch.Size(each.shape).numel() for each in self.tensors), default=0)
        return -(-end // ALIGN) * ALIGN

    @property
    def read_bytes(self) -> int:
        """Bytes that the disk gives for it."""
        return sum(extent.read_bytes for extent in joined(self.extents))


@dataclass
class _Load:
    """A piece on its way into the ring, at byte `start` of all that ever went in (the ring's byte is the remainder)."""

    index: int
    start: int
    end: int
    waiting: deque[Extent]                          # chunks nobody has begun to read
    missing: int                                    # chunks that are not there yet
    used: bool = False                              # taken and given back, or passed over
    ready: bool = False


@dataclass
class Statistics:
    """Since the window was made: seconds that products waited for pieces, pieces taken, pieces taken out of order, bytes loaded."""

    waited_s: float = 0.0
    taken: int = 0
    rewound: int = 0
    loaded_bytes: int = 0
    waits: dict[str, float] = field(default_factory=dict)


class WeightWindow:
    """Pieces in a ring of ring_bytes; those of `resident` (indices) in memory of their own.

    Nothing is read before start(). take(i) gives the piece's tensors, views of the ring that hold until give_back(i). Thread-safe;
    errors of the readers come out of take(). Raises ValueError when the ring cannot hold the largest streamed piece.
    """

    def __init__(
        self, pieces: Sequence[Piece], ring_bytes: int, resident: Sequence[int] = (), *, readers: int = READERS,
        reader: DiskReader | None = None,
    ) -> None:
        self.pieces = list(pieces)
        self.resident = frozenset(resident)
        self.order = [index for index in range(len(self.pieces)) if index not in self.resident and self.pieces[index].nbytes]
        self.ring_bytes = -(-ring_bytes // ALIGN) * ALIGN if self.order else 0
        largest = max((self.pieces[index].nbytes for index in self.order), default=0)
        if largest > self.ring_bytes:
            name = next(piece.name for piece in self.pieces if piece.nbytes == largest)
            raise ValueError(f"WeightWindow: ring_bytes is {ring_bytes}, expected at least {largest}, the size of {name}")
        self.statistics = Statistics()
        self.reader = reader or DiskReader()
        self._readers = readers
        self._ring = buffer(self.ring_bytes) if self.order else None
        self._bytes = None if self._ring is None else torch.frombuffer(self._ring, dtype=torch.uint8)
        self._kept: dict[int, torch.Tensor] = {}
        self._loads: deque[_Load] = deque()         # in the ring or on their way, oldest first
        self._place = {index: place for place, index in enumerate(self.order)}
        self._next = 0                              # place in `order` of the next piece to load
        self._head = self._tail = 0                 # bytes that ever went in, and of those given back
        self._reading = 0                           # chunks that threads are reading now
        self._rewinding = False
        self._checked: set[int] = set()
        self._failure: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    @property
    def nbytes(self) -> int:
        """Memory it holds once it has run: ring, residents, the readers' own buffers."""
        return self.ring_bytes + sum(self.pieces[index].nbytes for index in self.resident) + self._readers * CHUNK

    def start(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reads the residents, checks them, and lets the readers begin. progress(done_bytes, total_bytes) of the residents."""
        total = sum(self.pieces[index].nbytes for index in self.resident)
        memory, done = memoryview(buffer(total)) if total else None, 0         # one mapping: a process may have 65,530
        for index in sorted(self.resident):
            piece = self.pieces[index]
            own = memory[done : done + piece.nbytes]
            self._read_all(piece, own)
            self._check(index, own)
            self._kept[index] = torch.frombuffer(own, dtype=torch.uint8) if piece.nbytes else torch.empty(0, dtype=torch.uint8)
            done += piece.nbytes
            if progress is not None:
                progress(done, total)
        for number in range(self._readers if self.order else 0):
            thread = threading.Thread(target=self._run, name=f"hetero-attn-reader-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def take(self, index: int) -> tuple[torch.Tensor, ...]:
        """The tensors of piece `index`, loaded. Raises WindowError."""
        piece, self.statistics.taken = self.pieces[index], self.statistics.taken + 1
        if index in self._kept or not piece.nbytes:
            return _views(piece, self._kept.get(index), 0)
        began = time.perf_counter()
        with self._changed:
            load = self._wanted(index)
            while not load.ready:
                self._raise_failure()
                if not self._changed.wait(STUCK_S):
                    raise WindowError(f"{piece.name} did not come from the disk within {STUCK_S:g} s; "
                                      f"is {piece.extents[0].file} on a disk that answers?")
            self._raise_failure()
        waited = time.perf_counter() - began
        self.statistics.waited_s += waited
        self.statistics.waits[piece.name] = self.statistics.waits.get(piece.name, 0.0) + waited
        return _views(piece, self._bytes, load.start % self.ring_bytes)

    def give_back(self, index: int) -> None:
        """The tensors of the last take(index) are not used any more, and their memory is free."""
        if index in self._kept or not self.pieces[index].nbytes:
            return
        with self._changed:
            for load in self._loads:
                if load.index == index and load.ready and not load.used:
                    load.used = True
                    break
            self._free()

    def close(self) -> None:
        """Ends the readers and gives the memory back. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._kept.clear()
        self._loads.clear()
        self.reader.close()
        self._bytes = self._ring = None             # the mapping goes with its last view

    # ---- under the lock ------------------------------------------------------------------------------------------------

    def _wanted(self, index: int) -> _Load:
        """The load of a piece that is asked for now; what stands before it and was passed over is dropped."""
        self._raise_failure()
        place = next((place for place, load in enumerate(self._loads) if load.index == index and not load.used), None)
        expected = not self._loads and self.order[self._next] == index
        if place is None and not expected:
            self._rewind(index)
        elif place is not None:
            for load in list(self._loads)[:place]:
                load.used = True                                         # never taken: this pass does without it
            self._free()
        while True:
            found = next((load for load in self._loads if load.index == index and not load.used), None)
            if found is not None:
                return found
            if not self._place_next():
                self._raise_failure()
                self._changed.wait(1.0)

    def _rewind(self, index: int) -> None:
        """Forget what is in the ring and begin again at `index`. Reads under way end first: they write into it."""
        self.statistics.rewound += 1
        self._rewinding = True
        while self._reading:
            self._changed.wait(1.0)
            self._raise_failure()
        self._rewinding = False
        self._loads.clear()
        self._tail = self._head
        self._next = self._place[index]
        self._changed.notify_all()

    def _place_next(self) -> bool:
        """Give the next piece its place in the ring: whole, so perhaps at the ring's beginning. False where it has none yet."""
        piece = self.pieces[self.order[self._next]]
        start = self._head
        if start % self.ring_bytes + piece.nbytes > self.ring_bytes:
            start += self.ring_bytes - start % self.ring_bytes
        oldest = self._loads[0].start if self._loads else start
        if start - oldest >= self.ring_bytes:
            return False
        waiting = deque(chunk for extent in joined(piece.extents) for chunk in chunks(extent))
        self._loads.append(_Load(self.order[self._next], start, start + piece.nbytes, waiting, len(waiting)))
        self._head = start + piece.nbytes
        self._next = (self._next + 1) % len(self.order)
        return True

    def _free(self) -> None:
        """The oldest loads that have been used make room."""
        before = self._tail
        while self._loads and self._loads[0].used and self._loads[0].ready:
            self._tail = self._loads.popleft().end
        if self._loads:
            self._tail = self._loads[0].start
        if self._tail != before:
            self._changed.notify_all()

    def _chunk(self) -> tuple[_Load, Extent] | None:
        """A chunk that may be read now, None where there is no room for one."""
        if self._rewinding:
            return None
        for load in self._loads:
            if load.waiting:
                chunk = load.waiting[0]
                oldest = self._loads[0].start
                if load.start + chunk.into + chunk.nbytes > oldest + self.ring_bytes:
                    return None                     # its place is still another's
                return load, load.waiting.popleft()
        return self._chunk() if self._place_next() else None

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise WindowError(str(self._failure)) from self._failure
        if self._closed:
            raise WindowError("the weight window is closed")

    # ---- the readers ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        target = self._ring
        try:
            while True:
                with self._changed:
                    while (found := None if self._closed else self._chunk()) is None:
                        if self._closed:
                            return
                        self._changed.wait()
                    self._reading += 1
                load, chunk = found
                place = load.start % self.ring_bytes
                whole = False
                try:
                    self.reader.read(chunk, target[place : place + self.pieces[load.index].nbytes])
                    with self._changed:
                        self.statistics.loaded_bytes += chunk.nbytes
                        load.missing -= 1
                        whole = not load.missing
                    if whole:
                        self._check(load.index, target[place:])
                except BaseException as error:
                    self._failure = error           # before anybody is woken
                    raise
                finally:
                    with self._changed:
                        self._reading -= 1
                        load.ready |= whole and self._failure is None
                        self._free()                # it may have been passed over meanwhile
                        self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _read_all(self, piece: Piece, target: memoryview) -> None:
        for extent in joined(piece.extents):
            for chunk in chunks(extent):
                self.reader.read(chunk, target)
                self.statistics.loaded_bytes += chunk.nbytes

    def _check(self, index: int, memory: memoryview) -> None:
        """Compare a piece with its checksums the first time it is here. Raises WindowError."""
        piece = self.pieces[index]
        if index in self._checked:
            return
        for offset, nbytes, expected in piece.checks:
            if hashlib.sha256(memory[offset : offset + nbytes]).hexdigest() != expected:
                raise WindowError(f"{piece.extents[0].file} is damaged: the checksum of {piece.name} is not that of its export; "
                                  "copy the folder again, or run hetero-attn shard again")
        self._checked.add(index)


def _views(piece: Piece, memory: torch.Tensor | None, base: int) -> tuple[torch.Tensor, ...]:
    found = []
    for each in piece.tensors:
        count = each.dtype.itemsize * torch.Size(each.shape).numel()
        if memory is None:
            found.append(torch.empty(each.shape, dtype=each.dtype))
        else:
            found.append(memory[base + each.offset : base + each.offset + count].view(each.dtype).view(each.shape))
    return tuple(found)


class Lent:
    """A layer's hand on its piece: `with layer.streamed as (weight,):` lends the tensors for the product and gives them back after it."""

    def __init__(self, window: WeightWindow, index: int) -> None:
        self.window, self.index = window, index

    def __enter__(self) -> tuple[torch.Tensor, ...]:
        return self.window.take(self.index)

    def __exit__(self, *exception: object) -> None:
        self.window.give_back(self.index)
