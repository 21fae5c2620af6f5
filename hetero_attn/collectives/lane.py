"""A lane for copies beside the computing: a side stream on a device, a thread on the CPU, and marks to wait by.

What is started on a lane begins after all that the caller has begun so far, and after the marks it names; the caller goes on at once. On a
device nothing here stops the host but `synchronize`. The thread is the kind that carries collectives; a lane has one of its own, so that
neither waits for the other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from hetero_attn.collectives.background import CommunicationThread


class Mark(Protocol):
    """A place in a lane's work."""

    def wait(self) -> None:
        """What the caller begins from now on comes after it. Raises what the work raised."""

    def synchronize(self) -> None:
        """Returns when it is reached. Raises what the work raised."""


class Lane(Protocol):
    """One after the other, beside the caller."""

    def start(self, work: Callable[[], None], after: Iterable[Mark] = ()) -> Mark:
        """Begin `work` after what the caller has begun and after the marks."""

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, whose memory is not given away while this lane may still read or write it."""


def lanes(device: torch.device, count: int) -> list[Lane]:
    """Lanes for copies from and to the device: `count` streams, so that both directions of a bus are used; one thread on the CPU, which
    has no second direction."""
    if device.type == "cpu":
        return [ThreadLane()] * count
    return [StreamLane(device) for _ in range(count)]


class ThreadLane:
    """CPU tensors: the caller has done what it has begun, so only the marks remain to be waited for."""

    def __init__(self) -> None:
        thread = CommunicationThread("hetero-attn-copies")
        self._submit = thread.submit
        weakref.finalize(self, thread.close, 0.0)

    def start(self, work: Callable[[], None], after: Iterable[Mark] = ()) -> Mark:
        marks = tuple(after)

        def run() -> None:
            for mark in marks:
                mark.synchronize()
            work()

        return _ThreadMark(self._submit(run))

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor                                # what is started holds its tensors until it is done


class _ThreadMark:
    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def wait(self) -> None:
        self._handle.wait()

    synchronize = wait


class StreamLane:
    """A stream of torch.cuda, torch.npu or whatever torch.get_device_module gives for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._module = device, torch.get_device_module(device)
        self.stream = self._module.Stream(device=device)

    def start(self, work: Callable[[], None], after: Iterable[Mark] = ()) -> Mark:
        self.stream.wait_stream(self._module.current_stream(self._device))
        for mark in after:
            self.stream.wait_event(mark.event)
        with self._module.stream(self.stream):
            work()
            event = self._module.Event()
            event.record(self.stream)
        return _StreamMark(event, self._module, self._device)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(self.stream)
        return tensor


class _StreamMark:
    def __init__(self, event: Any, module: Any, device: torch.device) -> None:
        self.event, self._module, self._device = event, module, device

    def wait(self) -> None:
        self._module.current_stream(self._device).wait_event(self.event)

    def synchronize(self) -> None:
        self.event.synchronize()
