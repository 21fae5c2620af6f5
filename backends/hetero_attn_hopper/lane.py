"""In which order a communicator's kernels run on a device: one after the other, on whatever streams they were called.

Two of its kernels at once would meet at the same slots, so each waits for the one before it, by an event and without the host. Started
calls run on a side stream that begins behind the calling stream's work so far; a call that is not started runs on the calling stream. Under
a CUDA graph's capture only what the same capture holds may be waited for. So a graph is replayed on a stream that has waited for every call
made before, those of other graphs included, and calls after it are made on that stream or one that waits for it: nobody else sees a replay.

`streams` is torch.cuda, or what takes its place; None where a launch is done when it returns (the kernels executed on the CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from hetero_attn.communicator import Handle


class Mark(NamedTuple):
    """A place in the order: the number of a call, the event behind it, and the number of the capture it was made under (0 = none)."""

    number: int
    event: Any
    captured: int


class Lane:
    """The order of one communicator's calls. capture: the number of the capture that the current stream is in. priority: of the side
    stream; a low number runs first, so that the few CTAs of a sum get onto the device beside a product that fills it."""

    def __init__(self, streams: Any | None, device: torch.device, capture: Callable[[], int], *, priority: int = -1) -> None:
        self.streams, self.device, self._capture, self._priority = streams, device, capture, priority
        self._side: Any = None
        self._last: dict[bool, Mark | None] = {False: None, True: None}        # by whether it was captured
        self._number = 0

    @property
    def capture(self) -> int:
        """The number of the capture that the current stream is in, 0 = none."""
        return 0 if self.streams is None else self._capture()

    @property
    def users_stream(self) -> Any:
        """The current stream where others than this communicator work on it; None = it is the side stream, or there are no streams."""
        if self.streams is None:
            return None
        current = self.streams.current_stream(self.device)
        return None if current == self._side else current

    def run(self, call: Callable[[], Any]) -> tuple[Any, Mark | None]:
        """The call on the calling stream, behind all before it: (its result, its mark)."""
        if self.streams is None:
            return call(), None
        current = self.streams.current_stream(self.device)
        self.wait(self._last[bool(self.capture)], current)
        result = call()
        return result, self._mark(current)

    def start(self, call: Callable[[], Any], tensors: Iterable[torch.Tensor], checked: Callable[[], None]) -> tuple[Handle, Mark | None]:
        """The call on the side stream: what waits for it, and its mark. tensors: what it uses, which the caller may drop at once. checked:
        called by each wait(), raises what has gone wrong."""
        if self.streams is None:
            return Handle(call()), None
        if self._side is None:
            self._side = self.streams.Stream(device=self.device, priority=self._priority)
        side = self._side
        side.wait_stream(self.streams.current_stream(self.device))
        self.wait(self._last[bool(self.capture)], side)
        for tensor in tensors:
            _keep(tensor, side)
        with self.streams.stream(side):
            result = call()
        mark = self._mark(side)
        return LaneHandle(result, mark, self, checked), mark

    def wait(self, mark: Mark | None, stream: Any = None) -> None:
        """Let a stream (None: the calling one) wait for a mark."""
        if mark is not None and self.streams is not None and mark.captured == self.capture:
            (stream or self.streams.current_stream(self.device)).wait_event(mark.event)

    def wait_for_streams(self, streams: Iterable[Any]) -> None:
        """Let the calling stream wait for what others hold by now; not under a capture, which may not wait for what lies outside."""
        if self.streams is not None and not self.capture:
            current = self.streams.current_stream(self.device)
            for stream in streams:
                if stream != current:
                    current.wait_stream(stream)

    def _mark(self, stream: Any) -> Mark:
        self._number += 1
        capture = self.capture
        mark = self._last[bool(capture)] = Mark(self._number, stream.record_event(), capture)
        return mark


class LaneHandle(Handle):
    """A started call; wait() orders the calling stream behind it and leaves the host alone. Dropped unwaited under a capture, it joins the
    calling stream all the same: a capture cannot end while its side stream is apart."""

    def __init__(self, result: Any, mark: Mark, lane: Lane, checked: Callable[[], None]) -> None:
        super().__init__(result)
        self._mark, self._lane, self._checked = mark, lane, checked
        self._waited = False

    def __del__(self) -> None:
        if self._mark.captured and not self._waited:
            with suppress(Exception):                # at the interpreter's end there may be nothing left to ask
                self._lane.wait(self._mark)

    def wait(self) -> Any:
        self._checked()
        stream = self._lane.streams.current_stream(self._lane.device)
        stream.wait_event(self._mark.event)
        self._waited = True
        for tensor in self._result if isinstance(self._result, tuple) else (self._result,):
            _keep(tensor, stream)                    # made for the side stream, from now on used on this one
        return self._result


def _keep(tensor: Any, stream: Any) -> None:
    """Let torch's allocator not hand the tensor's memory on before the stream is done with it."""
    if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
        tensor.record_stream(stream)
