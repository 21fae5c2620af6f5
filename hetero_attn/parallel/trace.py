"""What ran when: a recorder that a schedule tells of its tasks, and the Chrome trace of all ranks that is made of it.

The file opens in chrome://tracing or ui.perfetto.dev: one process a rank, a compute lane and a communication lane in each, and where
layers' KV lies in host memory (offload.py) one lane for each direction of its copies and one for the host's attention. Times count from a
moment that the ranks meet at with nothing under way: by the host's monotonic clock on a CPU; by the device's events on a device, where only
what the host does to its end (its attention, sums through host memory) goes by the host's clock. On one host they are one time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.parallel.schedule_order import COMMUNICATION, COMPUTE

FETCHES, STORES, HOST = "copies to the device", "copies to the host", "attention on the host"
LANES = (COMPUTE, COMMUNICATION, FETCHES, STORES, HOST)
ALWAYS = (COMPUTE, COMMUNICATION)                    # shown even where nothing ran in them
SITE = "trace"


class Event(NamedTuple):
    """A task that ran. begin, end: seconds since the recorder began; rows: tokens (of a copy: those that the copied blocks hold); part: of
    the step's cut."""

    lane: str
    name: str
    begin: float
    end: float
    rows: int
    part: int


class Recorder:
    """Takes down one rank's tasks. On a device the lanes are timed by its own events, read when events() is asked for."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._events: list[Event] = []
        self._pending: list[tuple[str, str, Any, Any, int, int]] = []       # lane, name, marks, rows, part
        self._marker: Any = None
        self.overlapped = False                      # whether anything was started to go on beside computing
        self.begin()

    def begin(self) -> None:
        """Forget what was taken down; times count from now."""
        self._events, self._pending = [], []
        self.settle()                                # the device's zero and the host's are then one moment
        self._zero = time.perf_counter()
        self._zero_mark = self._mark()

    def settle(self) -> None:
        """Wait for what is under way on a device."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def events(self) -> list[Event]:
        """Everything so far, in the order in which it began. On a device, waits for what is under way."""
        self.settle()
        last = 0.0
        for lane, name, first, final, rows, part in self._pending:
            if final == []:                          # given up with an error: nobody has waited for it
                continue
            begin, end = self._seconds(first), self._seconds(final)
            if lane == COMMUNICATION:                # begins when it is ready and the one before it is done
                begin, last = max(begin, last), end
            self._events.append(Event(lane, name, begin, end, rows, part))
        self._pending = []
        return sorted(self._events, key=lambda event: event.begin)

    @contextmanager
    def compute(self, name: str, rows: int, part: int = 0):
        """The block is a task of the compute lane."""
        if self.device.type != "cpu":
            first = self._mark()
            yield
            self._pending.append((COMPUTE, name, first, self._mark(), rows, part))
            return
        began = time.perf_counter()
        yield
        self._keep(COMPUTE, name, began, rows, part)

    @contextmanager
    def on_host(self, name: str, rows: int):
        """The block is the host's processor attending, by the host's clock."""
        began = time.perf_counter()
        yield
        self._keep(HOST, name, began, rows, 0)

    def copying(self, lane: str, name: str, rows: int, work: Callable[[], None]) -> Callable[[], None]:
        """`work` as a lane for copies is to run it (FETCHES or STORES): taken down when it does, on that lane's own thread or stream."""

        def timed() -> None:
            if self.device.type != "cpu":
                first = self._mark()
                work()
                self._pending.append((lane, name, first, self._mark(), rows, 0))
                return
            began = time.perf_counter()
            work()
            self._keep(lane, name, began, rows, 0)

        return timed

    def start(
        self, communicator: Communicator, name: str, rows: int, part: int, operation: str, arguments: Sequence[Any], options: dict[str, Any]
    ) -> Callable[[], Any]:
        """Begin an operation of the communicator, to be taken down when it runs -> what waits for its result."""
        self.overlapped = True
        if self.device.type != "cpu":
            return self._on_device(communicator.start(operation, *arguments, **options), name, rows, part)

        def timed() -> Any:
            return self.call(communicator, name, rows, part, operation, arguments, options)

        return communicator.in_background(timed).wait

    def call(
        self, communicator: Communicator, name: str, rows: int, part: int, operation: str, arguments: Sequence[Any], options: dict[str, Any]
    ) -> Any:
        """Do an operation of the communicator now, and take it down -> its result."""
        if self.device.type != "cpu":
            return self._on_device(communicator.start(operation, *arguments, **options), name, rows, part)()
        began = time.perf_counter()
        result = getattr(communicator, operation)(*arguments, **options)
        self._keep(COMMUNICATION, name, began, rows, part)
        return result

    def _on_device(self, handle: Any, name: str, rows: int, part: int) -> Callable[[], Any]:
        """Mark when the handle's operation is over: by the clock where the host does it to its end, since waiting for that here would
        leave nothing beside it; else on a stream that does nothing but wait for it."""
        first, final = self._mark(), []

        def over() -> None:
            if not final:
                final.append(time.perf_counter())

        def wait() -> Any:
            result = handle.wait()
            over()                                   # whoever waits may be woken before over() is called
            return result

        if handle.when_over(over):
            self._pending.append((COMMUNICATION, name, first, final, rows, part))
            return wait
        module = torch.get_device_module(self.device)
        self._marker = self._marker or module.Stream(device=self.device)
        with module.stream(self._marker):
            handle.wait()
            self._pending.append((COMMUNICATION, name, first, self._mark(), rows, part))
        return handle.wait

    def _seconds(self, mark: Any) -> float:
        """Since the recorder began: of a mark on a stream, or of a list that holds a time of the host's."""
        return mark[0] - self._zero if isinstance(mark, list) else self._zero_mark.elapsed_time(mark) * 1e-3

    def _keep(self, lane: str, name: str, began: float, rows: int, part: int) -> None:
        self._events.append(Event(lane, name, began - self._zero, time.perf_counter() - self._zero, rows, part))

    def _mark(self) -> Any:
        if self.device.type == "cpu":
            return None
        module = torch.get_device_module(self.device)
        mark = module.Event(enable_timing=True)
        mark.record(module.current_stream())
        return mark


def recorded(recorder: Recorder | None, name: str, rows: int, part: int = 0) -> AbstractContextManager:
    """recorder.compute(), where there is a recorder."""
    return _UNRECORDED if recorder is None else recorder.compute(name, rows, part)


_UNRECORDED = nullcontext()


def meet(recorder: Recorder, communicator: Communicator) -> None:
    """All ranks begin to count here."""
    recorder.settle()
    communicator.barrier(site=SITE)
    recorder.begin()


def gather_events(recorder: Recorder, communicator: Communicator) -> list[list[Event]]:
    """Every rank's events, in rank order, on every rank. All ranks call this together."""
    own = torch.tensor(list(json.dumps(recorder.events()).encode()), dtype=torch.uint8)
    sizes = communicator.all_gather(torch.tensor([own.numel()]), sizes=[1] * communicator.world_size, site=SITE).tolist()
    texts = communicator.all_gather(own, sizes=sizes, site=SITE).split(sizes)
    return [[Event(*each) for each in json.loads(bytes(text.tolist()))] for text in texts]


def chrome_trace(ranks: Sequence[Sequence[Event]]) -> dict[str, Any]:
    """The trace as an object of Chrome's format: complete events ("X"), microseconds."""
    found: list[dict[str, Any]] = []
    used = {event.lane for events in ranks for event in events}
    lanes = [lane for lane in LANES if lane in ALWAYS or lane in used]
    for rank, events in enumerate(ranks):
        found.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        for place, lane in enumerate(lanes):
            found.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": place, "args": {"name": lane}})
            found.append({"ph": "M", "name": "thread_sort_index", "pid": rank, "tid": place, "args": {"sort_index": place}})
        for event in events:
            found.append({
                "ph": "X", "cat": event.lane, "name": event.name, "pid": rank, "tid": lanes.index(event.lane),
                "ts": round(event.begin * 1e6, 1), "dur": round((event.end - event.begin) * 1e6, 1),
                "args": {"rows": event.rows, "part": event.part},
            })
    return {"traceEvents": found, "displayTimeUnit": "ms"}
