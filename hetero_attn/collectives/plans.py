"""A checked call on its way: the plan that the operations make of it, and what start() gives the caller to wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from hetero_attn.collectives.exchange import Steps
from hetero_attn.communicator import Handle


class Plan(NamedTuple):
    """A checked call: its name for errors, its steps, whether all its collectives are issued by the first step, its tensors, whether it was
    made under inference mode or writes tensors that were, and whether a codec serves it: then the host takes part to its end."""

    text: str
    steps: Steps
    single: bool
    tensors: tuple[torch.Tensor, ...]
    inference: bool
    coded: bool = False

    @contextmanager
    def modes(self) -> Iterator[None]:
        """torch's modes for its steps, whoever runs them and when: those of the call, since torch keeps modes per thread and a handle may
        be waited for under others; and no gradient, since collectives carry none."""
        with torch.inference_mode(self.inference), torch.no_grad():
            yield


def plan(text: str, steps: Steps, single: bool, tensors: tuple[torch.Tensor, ...], *, coded: bool = False) -> Plan:
    """A Plan under the caller's modes."""
    inference = torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in tensors)
    return Plan(text, steps, single, tensors, inference, coded)


def text_of(operation: str, x: torch.Tensor, site: str) -> str:
    """A call in words, for errors: "all_reduce of x [4, 8] float32 at layers.0.o_proj"."""
    return f"{operation} of x {list(x.shape)} {str(x.dtype).removeprefix('torch.')}" + (f" at {site}" if site else "")


class WorkHandle(Handle):
    """An operation whose only collective is in flight; wait() does what is left, once."""

    def __init__(self, finish: Callable[[], Any]) -> None:
        super().__init__()
        self._finish: Callable[[], Any] | None = finish
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def wait(self) -> Any:
        with self._lock:
            if self._finish is not None:
                finish, self._finish = self._finish, None
                try:
                    self._result = finish()
                except Exception as error:
                    self._error = error
            if self._error is not None:
                raise self._error
            return self._result


class StreamHandle(Handle):
    """An operation on a device's side stream; wait() orders the calling stream after it and leaves the host alone."""

    def __init__(self, result: Any, event: Any, module: Any) -> None:
        super().__init__(result)
        self._event, self._module = event, module

    def wait(self) -> Any:
        stream = self._module.current_stream()
        stream.wait_event(self._event)
        return _used_on(stream, self._result)


class StagedHandle(Handle):
    """An operation that the communication thread has done to its end on a side stream; wait() waits for the thread."""

    def __init__(self, handle: Handle, module: Any) -> None:
        super().__init__()
        self._handle, self._module = handle, module

    def wait(self) -> Any:
        return _used_on(self._module.current_stream(), self._handle.wait())

    def when_over(self, call: Callable[[], None]) -> bool:
        return self._handle.when_over(call)


def _used_on(stream: Any, result: Any) -> Any:
    """The result, allocated for the side stream and from now on used on this one."""
    for tensor in result if isinstance(result, tuple) else (result,):
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
            continue
        tensor.record_stream(stream)
    return result
