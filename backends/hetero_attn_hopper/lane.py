"""In which order a communicator's kernels run on a device: one after the other, on whatever streams they were called.

Two of its kernels at once would meet at the same slots, so each waits for the one before it, by an event and without the host. Started
calls run on a side stream that begins behind the calling stream's work so far; a call that is not started runs on the calling stream. Under
a CUDA graph's capture only what belongs to the capture may be waited for: what was enqueued before lies before the graph anyway.

`streams` is torch.cuda, or what takes its place; None where a launch is done when it returns (the kernels executed on the CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from hetero_attn.communicator import Handle


class Mark(NamedTuple):
    """A place in the order: the number of a call, the event behind it, and whether it was made under a capture."""

    number: int
    event: Any
    captured: bool


class Lane:
    """The order of one communicator's calls. priority: of the side stream; a low number runs first, so that the few CTAs of a sum get onto
    the device beside a product that fills it."""

    def __init__(self, streams: Any | None, device: torch.device, *, priority: int = -1) -> None:
        self.streams, self._device, self._priority = streams, device, priority
        self._side: Any = None
        self._last: Mark | None = None
        self._number = 0

    @property
    def capturing(self) -> bool:
        return self.streams is not None and self.streams.is_current_stream_capturing()

    def run(self, call: Callable[[], Any]) -> tuple[Any, Mark | None]:
        """The call on the calling stream, behind all before it: (its result, its mark)."""
        if self.streams is None:
            return call(), None
        current = self.streams.current_stream(self._device)
        self.wait(self._last, current)
        result = call()
        return result, self._mark(current)

    def start(self, call: Callable[[], Any], tensors: Iterable[torch.Tensor], checked: Callable[[], None]) -> tuple[Handle, Mark | None]:
        """The call on the side stream: what waits for it, and its mark. tensors: what it uses, which the caller may drop at once. checked:
        called by each wait(), raises what has gone wrong."""
        if self.streams is None:
            return Handle(call()), None
        if self._side is None:
            self._side = self.streams.Stream(device=self._device, priority=self._priority)
        side = self._side
        side.wait_stream(self.streams.current_stream(self._device))
        self.wait(self._last, side)
        for tensor in tensors:
            _keep(tensor, side)
        with self.streams.stream(side):
            result = call()
        mark = self._mark(side)
        return LaneHandle(result, mark.event, self.streams, self._device, checked), mark

    def wait(self, mark: Mark | None, stream: Any = None) -> None:
        """Let a stream (None: the calling one) wait for a mark."""
        if mark is not None and self.streams is not None and mark.captured == self.capturing:
            (stream or self.streams.current_stream(self._device)).wait_event(mark.event)

    def _mark(self, stream: Any) -> Mark:
        self._number += 1
        self._last = Mark(self._number, stream.record_event(), self.capturing)
        return self._last


class LaneHandle(Handle):
    """A started call; wait() orders the calling stream behind it and leaves the host alone."""

    def __init__(self, result: Any, event: Any, streams: Any, device: torch.device, checked: Callable[[], None]) -> None:
        super().__init__(result)
        self._event, self._streams, self._device, self._checked = event, streams, device, checked

    def wait(self) -> Any:
        self._checked()
        stream = self._streams.current_stream(self._device)
        stream.wait_event(self._event)
        for tensor in self._result if isinstance(self._result, tuple) else (self._result,):
            _keep(tensor, stream)                    # made for the side stream, from now on used on this one
        return self._result


def _keep(tensor: Any, stream: Any) -> None:
    """Let torch's allocator not hand the tensor's memory on before the stream is done with it."""
    if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
        tensor.record_stream(stream)
