"""The communication thread: does one call after the other while the caller computes.

An operation of several collectives cannot be handed to torch.distributed as one work object; somebody has to start the second when the
first is done. One thread and one queue do it, so that every rank issues its collectives in the order in which the program started them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from hetero_attn import in_flight
from hetero_attn.communicator import Handle


class FutureHandle(Handle):
    """Waits for a call of the communication thread. The call itself is bounded, so this wait is too."""

    def __init__(self, future: Future) -> None:
        super().__init__()
        self._future = future

    def wait(self) -> Any:
        return self._future.result()

    def when_over(self, call: Callable[[], None]) -> bool:
        self._future.add_done_callback(lambda future: call())
        return True


class CommunicationThread:
    """A queue of calls and the thread that does them in order. The thread starts with the first call and is a daemon."""

    def __init__(self, name: str = "hetero-attn-communication") -> None:
        self._name = name
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._unfinished = 0

    def busy(self) -> bool:
        """Whether calls are queued or running: whoever would issue a collective meanwhile must queue behind them.

        Never for a call that runs on the thread itself: what it issues in turn is part of it.
        """
        return self._unfinished > 0 and threading.current_thread() is not self._thread

    def submit(self, call: Callable[[], Any]) -> FutureHandle:
        """Queue a call; it runs under the caller's grad and inference modes, which torch keeps per thread."""
        future: Future = Future()
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with self._lock:
            self._unfinished += 1
        in_flight.begin()
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        self._calls.put((future, call, modes))
        return FutureHandle(future)

    def close(self, timeout_s: float) -> bool:
        """Finish what is queued and end the thread; False when that takes longer than timeout_s."""
        if self._thread is None:
            return True
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call, (grad, inference) = item
            try:
                with torch.inference_mode(inference), torch.set_grad_enabled(grad and not inference):
                    result, error = call(), None
            except BaseException as caught:          # whatever it was belongs to the caller, who gets it from wait()
                result, error = None, caught
            with self._lock:                         # first not busy, then ready: a caller woken by the result may issue at once
                self._unfinished -= 1
            in_flight.end()
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
            del item, future, call, result, error    # an idle thread keeps no tensor alive
