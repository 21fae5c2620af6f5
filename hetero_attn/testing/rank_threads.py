"""Ranks as threads of one process, for communicators whose device is emulated: no processes, no torch.distributed, 8 ranks in milliseconds.

ThreadCommunicator is the base that such a communicator wraps: its ranks lay their tensors side by side and each takes what is its own. Real
ranks (ranks.py) are what a communicator is judged by where it can have them; threads serve where the group's memory must be one address
space.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hetero_attn.collective_arguments import check_all_gather, check_all_reduce, check_broadcast
from hetero_attn.communicator import Communicator, CommunicatorError
from hetero_attn.testing.ranks import Outcome

HALVES = (torch.float16, torch.bfloat16)


class Hub:
    """Where the ranks of a group meet."""

    def __init__(self, world_size: int, timeout_s: float) -> None:
        self.world_size, self.timeout_s = world_size, timeout_s
        self._given: list[Any] = [None] * world_size
        self._met: dict[int, list[Any]] = {}             # number of a meeting -> what was given; the last two, for who is slow to leave
        self._number = self._arrived = 0
        self._aborted, self._changed = False, threading.Condition()

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Every rank's value. Raises RuntimeError when not all come in time. A meeting that has come about is not undone by abort()."""
        with self._changed:
            number = self._number
            self._given[rank] = value
            self._arrived += 1
            if self._arrived == self.world_size:
                self._met[number], self._arrived, self._number = list(self._given), 0, number + 1
                self._met.pop(number - 2, None)
                self._changed.notify_all()
            else:
                self._changed.wait_for(lambda: number in self._met or self._aborted, self.timeout_s)
            if number not in self._met:
                self._aborted = True
                self._changed.notify_all()
                raise RuntimeError("a rank did not come")
            return self._met[number]

    def abort(self) -> None:
        """A rank has ended: nobody waits for it."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()


class ThreadCommunicator(Communicator):
    """One rank's end of a Hub. Everything is done when it returns."""

    def __init__(self, hub: Hub, rank: int) -> None:
        super().__init__(rank, hub.world_size)
        self.timeout_s, self._hub, self._closed = hub.timeout_s, hub, False

    def _all(self, x: Any, text: str) -> list[Any]:
        self.raise_if_broken()
        try:
            return self._hub.exchange(self.rank, x)
        except RuntimeError as error:
            raise self.fail(text, error, 0.0) from error

    def all_reduce(self, x: torch.Tensor, *, site: str = "") -> torch.Tensor:
        check_all_reduce(x)
        everyone = self._all(x.detach().clone(), "all_reduce")
        total = everyone[0].float() if x.dtype in HALVES else everyone[0].clone()
        for other in everyone[1:]:
            total += other
        with torch.inference_mode(x.is_inference()), torch.no_grad():
            return x.copy_(total)

    def all_gather(self, x: torch.Tensor, dim: int = 0, *, sizes: Sequence[int] | None = None, site: str = "") -> torch.Tensor:
        dim = check_all_gather(x, dim, sizes, self.rank, self.world_size)
        return torch.cat(self._all(x.detach().clone(), "all_gather"), dim)

    def broadcast(self, x: torch.Tensor, src: int = 0, *, site: str = "") -> torch.Tensor:
        check_broadcast(x, src, self.world_size)
        sent = self._all(x.detach().clone(), "broadcast")[src]
        with torch.inference_mode(x.is_inference()), torch.no_grad():
            return x.copy_(sent)

    def raise_if_broken(self) -> None:
        super().raise_if_broken()
        if self._closed:
            raise CommunicatorError(f"rank {self.rank} of {self.world_size}: the communicator has been closed", rank=self.rank)

    def close(self) -> None:
        self._closed = True


def on_threads(fn: Callable[..., Any], world_size: int, *, wrap: Callable[[Communicator], Communicator] = lambda base: base,
               args: Sequence[Any] = (), timeout_s: float = 30.0) -> list[Outcome]:
    """fn(communicator, *args) in `world_size` threads -> their outcomes in rank order. wrap: the communicator that is made of each rank's
    base; all ranks call it together."""
    hub, outcomes = Hub(world_size, timeout_s), [Outcome()] * world_size

    def run(rank: int) -> None:
        try:
            with wrap(ThreadCommunicator(hub, rank)) as communicator:
                outcomes[rank] = Outcome(result=fn(communicator, *args))
        except BaseException as error:
            outcomes[rank] = Outcome(error=type(error).__name__, text=str(error), traceback=traceback.format_exc())
            hub.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank-{rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
