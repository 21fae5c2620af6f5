"""When a planned call runs, and what becomes of its failure: the half of the torch.distributed communicator that knows no operation.

A call runs now, in flight, or on the communication thread, always in the order in which the program asked. One failure breaks the
communicator for good: the error names the missing rank, and each later call raises it again.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hetero_attn.collective_arguments import check_rank
from hetero_attn.collectives.background import CommunicationThread
from hetero_attn.collectives.exchange import Exchange
from hetero_attn.collectives.liveness import RollCall
from hetero_attn.collectives.plans import Plan, StagedHandle, StreamHandle, WorkHandle
from hetero_attn.communicator import Communicator, CommunicatorError, Handle

CLOSE_S = 3.0                                        # close() waits no longer than this for what is in flight
MOST_IN_FLIGHT = 256                                 # operations whose handles nobody waits for


class PlanRunner(Communicator):
    """Runs the plans that a subclass makes of its operations. exchange: what its steps send with; the other arguments are
    DistributedCommunicator's."""

    def __init__(
        self, exchange: Exchange, store: dist.Store, *, device: torch.device | str, timeout_s: float, leave: Callable[[], None],
        store_rank: int | None,
    ) -> None:
        super().__init__(exchange.rank, exchange.world_size, device=device)
        self.timeout_s = timeout_s
        self._exchange, self._leave = exchange, leave
        self._thread = CommunicationThread()
        self._in_flight: deque[Any] = deque()
        self._failing = threading.Lock()
        self._closed = self._left = False            # closed: takes no new call; left: the group is gone
        self._calls = self._finished = 0             # begun, and run to their ends
        self._now_doing = "outside any collective (none so far)"
        self._side_stream: Any = None
        self._store_rank = store_rank
        self._store, self._signals = store, dict.fromkeys(range(self.world_size), 0)
        this = weakref.ref(self)                     # the answering thread must not keep the communicator alive
        self._roll_call = RollCall(store, self.rank, self.world_size, lambda: _doing(this()), lambda: getattr(this(), "_finished", 0))
        atexit.register(_leave_at_exit, this)

    def planned(self, operation: str, *args: Any, **options: Any) -> Plan:
        """The plan of a call of the method named `operation`. Raises TypeError or ValueError for arguments it does not take."""
        raise NotImplementedError(f"{type(self).__name__} must define planned()")

    # ---- running ----------------------------------------------------------------------------------------------------------------

    def _run(self, plan: Plan) -> Any:
        self._raise_if_broken(self._closed)
        if self._thread.busy():                      # keep the order of issue: what was started before comes before
            if any(tensor.device.type != "cpu" for tensor in plan.tensors):
                return self._start_staged(plan).wait()             # the thread's stream knows nothing of the caller's
            return self._thread.submit(lambda: self._finish(plan)).wait()
        return self._finish(plan)

    def start(self, operation: str, *args: Any, **options: Any) -> Handle:
        plan = self.planned(operation, *args, **options)
        self._raise_if_broken(self._closed)
        while self._in_flight and self._in_flight[0].is_completed():
            self._in_flight.popleft()
        if len(self._in_flight) > MOST_IN_FLIGHT:    # dropped handles: messages tell only those who wait that they are done
            self._await_oldest(plan)
        if self._exchange.is_native(plan.tensors[0]) and not plan.coded and not self._thread.busy():
            return self._start_on_stream(plan)       # else the thread issues it, behind what it has: ranks must keep one order
        if any(tensor.device.type != "cpu" for tensor in plan.tensors):
            return self._start_staged(plan)
        if not plan.single or self._thread.busy():
            return self._thread.submit(lambda: self._finish(plan))
        first = self._advance(plan)
        if isinstance(first, Handle):
            return first
        self._in_flight.append(first)
        return WorkHandle(lambda: self._finish(plan, first))

    def _await_oldest(self, plan: Plan) -> None:
        began = time.monotonic()
        try:
            self._in_flight.popleft().wait()
        except RuntimeError as error:
            raise self.fail(f"an operation started before {plan.text}", error, began) from error

    def _advance(self, plan: Plan) -> Any:
        """Issue the first collective: its work object, or a finished Handle where nothing had to be sent."""
        try:
            with plan.modes():
                return next(plan.steps)
        except StopIteration as done:
            return Handle(done.value)
        except RuntimeError as error:
            raise self.fail(plan.text, error, time.monotonic()) from error

    def _finish(self, plan: Plan, work: Any = None) -> Any:
        """Run the steps to their end, from `work` on where it is in flight already."""
        self._raise_if_broken(self._left and work is None)
        self._calls += 1
        self._now_doing = f"in {plan.text} (call {self._calls})"
        began = time.monotonic()
        try:
            with plan.modes():
                while True:
                    if work is not None:
                        work.wait()
                    work = next(plan.steps)
        except StopIteration as done:
            self._end_call(plan)
            return done.value
        except RuntimeError as error:
            if isinstance(error, CommunicatorError):
                raise
            raise self.fail(plan.text, error, began) from error
        except Exception:                            # refused on all ranks alike (unlike shapes, NaN under a codec): the group goes on
            self._end_call(plan)
            raise

    def _end_call(self, plan: Plan) -> None:
        self._now_doing = f"outside any collective (last: {plan.text}, call {self._calls})"
        self._finished += 1

    def _start_on_stream(self, plan: Plan) -> Handle:
        """NCCL, HCCL: issue everything on a side stream that starts after the calling stream's work so far."""
        module = torch.get_device_module(plan.tensors[0].device)
        if self._side_stream is None:
            self._side_stream = module.Stream(device=plan.tensors[0].device)
        side = self._side_stream
        side.wait_stream(module.current_stream())
        for tensor in plan.tensors:
            tensor.record_stream(side)               # the caller may drop them before the side stream has read them
        with module.stream(side):
            result = self._finish(plan)
            event = side.record_event()
        return StreamHandle(result, event, module)

    def _start_staged(self, plan: Plan) -> Handle:
        """Device tensors through host memory: the thread waits for the calling stream's work so far, then copies and sends."""
        module = torch.get_device_module(self.device)
        ready = module.current_stream().record_event()
        side = self._side_stream = self._side_stream or module.Stream(device=self.device)

        def call() -> Any:
            with module.stream(side):
                side.wait_event(ready)
                try:
                    return self._finish(plan)
                finally:
                    side.synchronize()               # the caller gives its tensors away after an error too

        return StagedHandle(self._thread.submit(call), module)

    # ---- idling, failing, ending ------------------------------------------------------------------------------------------------

    def await_signal(self, src: int = 0, *, site: str = "") -> None:
        check_rank("await_signal", "src", src, self.world_size)
        self._raise_if_broken(self._closed)
        self._signals[src] += 1
        key = f"signal/{src}"                        # a counter: the store answers add(key, 0) at once, and it never grows
        text = f"await_signal from rank {src}" + (f" at {site}" if site else "")
        began = asked = time.monotonic()
        try:
            if self.rank == src:
                self._store.add(key, 1)
                return
            self._now_doing = f"in {text}"
            while self._store.add(key, 0) < self._signals[src]:
                now = time.monotonic()               # polled, since Ctrl-C cannot interrupt a blocking wait; a tenth of the time so far
                time.sleep(min(max(2e-4, 0.1 * (now - began)), 0.025))
                if now - asked > self.timeout_s:
                    if src not in self._roll_call.ask([src]):
                        raise RuntimeError(f"rank {src} stopped answering")
                    asked = time.monotonic()
            self._now_doing = f"outside any collective (last: {text})"
        except RuntimeError as error:
            raise self.fail(text, error, began) from error

    def busy(self) -> bool:
        return self._thread.busy()

    def in_background(self, call: Callable[[], Any]) -> Handle:
        self._raise_if_broken(self._closed)          # the thread that would run it has been told to end: nobody would ever answer
        return self._thread.submit(call)

    def raise_if_broken(self) -> None:
        self._raise_if_broken(self._closed)

    def _raise_if_broken(self, too_late: bool) -> None:
        if self.failure is not None:
            first = self.failure
            raise CommunicatorError(str(first), rank=first.rank, operation=first.operation, missing=first.missing)
        if too_late:
            raise CommunicatorError(f"rank {self.rank} of {self.world_size}: the communicator has been closed", rank=self.rank)

    def fail(self, text: str, error: Exception, began: float) -> CommunicatorError:
        """The error for a failed operation, after a look at who is still there; the first one is kept and breaks the communicator."""
        with self._failing:
            if self.failure is None:
                waited = time.monotonic() - began
                self._now_doing = f"in {text} (call {self._calls}), where it has failed"
                missing, found = self._look_around()
                detail = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". This is typically")[0]
                message = (
                    f"rank {self.rank} of {self.world_size}: {text} failed after {waited:.1f} s "
                    f"(time-out {self.timeout_s:g} s): {found} [{detail}]"
                )
                self.failure = CommunicatorError(message, rank=self.rank, operation=text, missing=missing)
            return self.failure

    def _look_around(self) -> tuple[list[int], str]:
        """The ranks that do not answer, and what can be said in words."""
        try:
            answers = self._roll_call.ask()
            left = self._roll_call.left()
        except RuntimeError:
            if self._store_rank is None:
                return [], "nobody can be asked who is missing, torchrun's agent and its store are gone"
            return [self._store_rank], f"rank {self._store_rank} is gone, and with it the rendezvous store that it served"
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        missing = [rank for rank in others if rank not in answers]
        lines = [
            f"rank {rank} " + ("has closed its communicator" if rank in left else "does not answer (killed, stopped or unreachable)")
            for rank in missing
        ]
        lines += [f"rank {rank} is alive, {answers[rank]}" for rank in others if rank in answers]
        if not missing:
            lines.insert(0, "every rank is alive, so their calls are out of step or one came too late")
        return missing, "; ".join(lines)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._settle(CLOSE_S) and self._exchange.wire.used and self.failure is None:
            # Peers keep writing to us, that their receives are posted; closing on what we have not read loses what they have not got.
            self._roll_call.await_finished(self._finished, CLOSE_S)
        self._left = True                            # what is queued still must not start on a later communicator's group
        self._roll_call.close()
        self._leave()

    def _settle(self, limit_s: float) -> bool:
        """Wait for what is in flight, but not long; False when something still is."""
        deadline = time.monotonic() + limit_s
        settled = self._thread.close(limit_s)
        for work in self._in_flight:
            left = deadline - time.monotonic()
            try:
                if not work.is_completed():
                    work.wait(timedelta(seconds=max(left, 0.001)))
            except RuntimeError:
                settled = settled and work.is_completed()
        return settled


def _leave_at_exit(this: weakref.ref) -> None:
    """Close at interpreter exit. Where a dead peer leaves gloo's threads waiting, their destructors would hang the exit, or abort it."""
    communicator = this()
    if communicator is None:
        return
    broken = communicator.failure is not None
    communicator.close()
    if broken and not communicator._settle(0.1):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _doing(communicator: PlanRunner | None) -> str:
    """What the rank is at, for one that asks: a call of this communicator, else what a wrapper says, else the last call."""
    if communicator is None:
        return "gone"
    own = communicator._now_doing
    return own if own.startswith("in ") or communicator.wrapper_doing is None else communicator.wrapper_doing() or own
