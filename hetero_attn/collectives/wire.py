"""The wire: messages of bytes between two ranks, with the receives of coming messages posted before anybody sends them.

gloo sends nothing until the receiver has posted its receive and has said so, which costs one more latency a hop when that happens late. So
for every peer and every class of sizes that has been used, receives stay posted ahead: the receiver's word has arrived long before the
next call. gloo lets a message be shorter than its receive, so one class serves all shapes of a power of two, whatever algorithm sends them.
Messages of one pair and class keep their order, which is the order of the program on both sides; that is all that tells calls apart.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

SMALLEST_BYTES = 1 << 8                              # one class for all that is smaller: barriers, counts, sizes
AHEAD_BYTES = 1 << 18                                # longer messages are posted when asked for: their latency hardly counts
AHEAD = 2                                            # receives kept posted for each peer and class: a sender may be a call ahead of us
LARGE_TAG = 63                                       # of all longer messages; a class's tag is the exponent of its size


def size_class(nbytes: int) -> int:
    """The exponent of the smallest power of two that holds nbytes; LARGE_TAG for what is not received ahead."""
    if nbytes > AHEAD_BYTES:
        return LARGE_TAG
    return (nbytes - 1).bit_length() if nbytes > SMALLEST_BYTES else SMALLEST_BYTES.bit_length() - 1


class Pending:
    """Several sends and receives as one work object: wait() once for all, from any thread; kept alive until they are done."""

    def __init__(self, works: Iterable[Any]) -> None:
        self._works = list(works)
        self._lock = threading.Lock()

    def is_completed(self) -> bool:
        """Whether somebody has waited for all of them; gloo tells of point-to-point works only to those who wait."""
        return not self._works

    def wait(self, timeout: timedelta | None = None) -> None:
        """Return when all are done; a RuntimeError when one fails or the group's time-out (or `timeout` for all together) is over."""
        deadline = None if timeout is None else time.monotonic() + timeout.total_seconds()
        with self._lock:                             # a second wait for the same gloo work would wait for a second message
            for done, work in enumerate(self._works):
                try:
                    if deadline is None:
                        work.wait()
                    else:
                        work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
                except BaseException:
                    del self._works[:done]
                    raise
            self._works = []


class Arrival:
    """One message that is expected: its receive is posted. `payload` is its bytes once `work` has been waited for."""

    __slots__ = ("_buffer", "_nbytes", "_pool", "work")

    def __init__(self, buffer: torch.Tensor, work: Any, nbytes: int, pool: list[torch.Tensor] | None) -> None:
        self._buffer, self.work, self._nbytes, self._pool = buffer, work, nbytes, pool

    @property
    def payload(self) -> torch.Tensor:
        """uint8 [nbytes], valid until release()."""
        return self._buffer[: self._nbytes]

    def release(self) -> None:
        """The payload has been read: its memory may take another message."""
        if self._pool is not None:
            self._pool.append(self._buffer)
            self._pool = None


class Mailbox:
    """The messages of one class from one peer: receives posted in the order in which they will be asked for."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.posted: deque[tuple[torch.Tensor, Any]] = deque()
        self.free: list[torch.Tensor] = []


class Wire:
    """What an algorithm sends and receives with, in one rank. Each pair's messages are expected in the order in which they are sent.

    group: a process group over the world that takes CPU tensors (gloo); None = the default one.
    """

    def __init__(self, rank: int, world_size: int, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.world_size = rank, world_size
        self.peers = [(rank + step) % world_size for step in range(1, world_size)]      # not everybody begins with rank 0
        self.bytes_sent = 0                          # payload bytes handed to torch.distributed since the beginning
        self.used = False                            # whether anything was ever sent or expected
        self._group, self._calls = group, None
        self._boxes: dict[tuple[int, int], Mailbox] = {}
        self._wanting: list[tuple[int, int]] = []    # boxes with fewer than AHEAD receives posted

    def expect(self, sender: int, nbytes: int) -> Arrival:
        """The next message from `sender`, of nbytes > 0 bytes; posted at the latest now."""
        self.used = True
        tag = size_class(nbytes)
        if tag == LARGE_TAG:
            buffer = torch.empty(nbytes, dtype=torch.uint8)
            return Arrival(buffer, self._post(buffer, sender, tag), nbytes, None)
        key = sender, tag
        box = self._boxes.get(key)
        if box is None:
            box = self._boxes[key] = Mailbox(1 << tag)
        if not box.posted:
            self._post_ahead(sender, tag, box)
        buffer, work = box.posted.popleft()
        self._wanting.append(key)
        return Arrival(buffer, work, nbytes, box.free)

    def send(self, payload: torch.Tensor, to: int) -> Any:
        """Begin to send uint8 [n], n > 0, to a rank; its memory must not change until the work returned has been waited for."""
        self.used = True
        nbytes = payload.numel()
        self.bytes_sent += nbytes
        return self._transmit(payload, to, size_class(nbytes))

    def replenish(self) -> None:
        """Post receives in place of those taken. Called when a call's first messages are out, so that it delays none of them."""
        wanting, self._wanting = self._wanting, []
        for sender, tag in wanting:
            box = self._boxes[sender, tag]
            while len(box.posted) < AHEAD:
                self._post_ahead(sender, tag, box)

    def _post_ahead(self, sender: int, tag: int, box: Mailbox) -> None:
        if box.free:
            buffer = box.free.pop()
        else:
            with torch.inference_mode(False):        # it outlives the call, and may be of use in another mode
                buffer = torch.empty(box.capacity, dtype=torch.uint8)
        box.posted.append((buffer, self._post(buffer, sender, tag)))

    def _post(self, buffer: torch.Tensor, sender: int, tag: int) -> Any:
        return (self._calls or self._bind())[1]([buffer], sender, tag)

    def _transmit(self, payload: torch.Tensor, to: int, tag: int) -> Any:
        return (self._calls or self._bind())[0]([payload], to, tag)

    def _bind(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The group's own send and recv: dist.isend and irecv look the group up and check it at every message."""
        group = self._group or dist.group.WORLD
        self._calls = group.send, group.recv
        return self._calls


def received(arrivals: Iterable[Arrival]) -> list[Any]:
    """The works of arrivals, to be waited for."""
    return [arrival.work for arrival in arrivals]


def release(arrivals: Sequence[Arrival]) -> None:
    """All payloads have been read."""
    for arrival in arrivals:
        arrival.release()
