"""The communication lane on a device: its order of streams and events, held to happens-before by stand-ins for streams.

No device is here; what is tested (run_blocks, PlanRunner.start, its handles, Recorder) is the code that devices run, on streams that only
take down who waits for whom. A tensor knows where and when it was last written: whoever reads it on a stream that has not waited for that
has found a race.
"""

import collections
import contextlib
import copy
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from hetero_attn.collectives.background import CommunicationThread
from hetero_attn.collectives.plans import Plan
from hetero_attn.collectives.runner import PlanRunner
from hetero_attn.parallel.schedule import Block, SumNorm, run_blocks
from hetero_attn.parallel.schedule_order import Cut
from hetero_attn.parallel.trace import Recorder


class Device:
    """A device module (torch.cuda, torch.npu) of streams with vector clocks: stream -> how many of its operations are known to be over."""

    def __init__(self):
        outer = self

        class Stream:
            def __init__(self, device=None):
                self.clock = collections.Counter()

            def step(self):
                self.clock[id(self)] += 1
                return self.clock.copy()

            def wait_stream(self, other):
                self.clock |= other.clock

            def wait_event(self, event):
                self.clock |= event.at

            def record_event(self):
                return SimpleNamespace(at=self.step())

            def synchronize(self):
                outer.synchronized.append(self)

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self, stream):
                self.at, self.time = stream.step(), time.perf_counter()

            def elapsed_time(self, other):
                return (other.time - self.time) * 1e3

        self.Stream, self.Event, self._current = Stream, Event, [Stream()]
        outer.library = Stream()                                         # NCCL's or HCCL's own
        outer.synchronized = []

    def current_stream(self):
        return self._current[-1]

    def synchronize(self):
        pass

    @contextlib.contextmanager
    def stream(self, stream):
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()


class Tensor:
    """What a stream wrote, [rows, 8]; the streams that the allocator was told of."""

    device, is_inference = SimpleNamespace(type="fake"), staticmethod(lambda: False)

    def __init__(self, device, rows=4):
        self.module, self.home, self.told, self.shape = device, device.current_stream(), set(), (rows, 8)
        self.write()

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        view = copy.copy(self)
        view.shape = (len(range(len(self))[rows]), 8)
        return view

    def clone(self):
        self.read()
        return Tensor(self.module, len(self))

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function is torch.cat
        for each in args[0]:
            each.read()
        return Tensor(args[0][0].module, sum(map(len, args[0])))

    def write(self):
        self.written = self.module.current_stream().step()

    def record_stream(self, stream):
        self.told.add(id(stream))

    def read(self):
        stream = self.module.current_stream()
        assert all(stream.clock[each] >= count for each, count in self.written.items()), "read before it was written"
        assert stream is self.home or id(stream) in self.told, "the allocator may give its memory away while it is read"


class Runner(PlanRunner):
    """PlanRunner without a group: its plans sum on the library's stream, and norm on the stream they run on."""

    def __init__(self, module):
        self.module, self.failure, self._side_stream, self._in_flight = module, None, None, collections.deque()
        self.rank, self.world_size = 0, 2
        self._closed = self._left = False
        self._calls = self._finished = 0
        self._failing, self._exchange = threading.Lock(), SimpleNamespace(is_native=lambda x: True)
        self._thread = SimpleNamespace(busy=lambda: False)

    def planned(self, operation, x, residual=None, *norm, **options):
        def steps():
            x.read()
            self.module.library.wait_stream(self.module.current_stream())
            event = self.module.library.record_event()
            yield SimpleNamespace(wait=lambda: self.module.current_stream().wait_event(event))
            if residual is None:                                         # of embedded rows
                return Tensor(self.module, len(x))
            residual.read()
            residual.write()
            return Tensor(self.module, len(x)), residual

        return Plan(operation, steps(), False, (x,) if residual is None else (x, residual), False)


@pytest.fixture
def device(monkeypatch):
    made = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: made)
    return made


def test_two_parts_wait_for_their_own_sums_and_for_nothing_else(device):
    """Two parts through four blocks: products on the calling stream, sums on the side stream, the last one started always under way."""
    runner, computed = Runner(device), []

    def compute(x, context=None):
        x.read()
        side, known = runner._side_stream, device.current_stream().clock[id(runner._side_stream)]
        assert known < side.clock[id(side)], "the other part's sum was waited for"
        computed.append(len(x))
        return Tensor(device, len(x))

    def embed(rows, lane):
        return lane.start("embed", 0, "all_reduce", Tensor(device, len(rows)))

    cut = Cut.at(8, [4])
    blocks = [Block(f"{place}", compute, compute, SumNorm(None, 1e-5)) for place in range(4)]
    found = run_blocks(blocks, lambda x: x, embed, dict.fromkeys(cut.parts), cut, runner)
    assert len(found) == 8 and computed == [4] * 2 * 2 * 4
    found.read()


def test_a_result_read_without_waiting_is_caught(device):
    handle = Runner(device).start("all_reduce_rms_norm", Tensor(device), Tensor(device))
    with pytest.raises(AssertionError, match="before it was written"):
        handle._result[0].read()
    handle.wait()[0].read()


def test_a_side_stream_that_does_not_wait_for_the_product_is_caught(device, monkeypatch):
    monkeypatch.setattr(device.Stream, "wait_stream", lambda self, other: None)
    with pytest.raises(AssertionError, match="before it was written"):
        Runner(device).start("all_reduce_rms_norm", Tensor(device), Tensor(device))


# ---- sums under a codec, to whose end the host waits ---------------------------------------------------------------------------------


class CodedRunner(Runner):
    """Its plans pack on the stream they run on; `fails`: after that."""

    def __init__(self, module, fails=False):
        super().__init__(module)
        self._thread, self.device, self.fails = CommunicationThread("test"), Tensor.device, fails

    def fail(self, text, error, began):
        return RuntimeError(f"{text}: {error}")

    def planned(self, operation, x, *, site=""):
        def steps():
            x.read()
            yield SimpleNamespace(wait=lambda: None)
            if self.fails:
                raise RuntimeError("the device has gone")
            return Tensor(self.module)

        return Plan("all_reduce", steps(), True, (x,), False, coded=True)


def test_a_coded_sum_over_a_device_library_runs_on_the_thread_behind_the_calling_streams_work(device):
    runner, x = CodedRunner(device), Tensor(device)
    x.told.add("any")
    x.read = lambda: Tensor.read(x) if device.current_stream() is x.home else seen.append(device.current_stream().clock.copy())
    seen = []
    handle = runner.start("all_reduce", x)
    result = handle.wait()
    assert len(seen) == 1 and all(seen[0][each] >= count for each, count in x.written.items())
    assert device.synchronized == [runner._side_stream] and id(device.current_stream()) in result.told
    assert runner._thread.close(1)


def test_what_is_started_behind_a_coded_sum_is_issued_behind_it(device):
    """Ranks whose threads are quicker must not issue the library's collectives in another order."""
    runner, order = CodedRunner(device), []
    first = runner._thread.submit(lambda: (time.sleep(0.1), order.append("coded")))
    runner.planned = lambda operation, x, *, site="": Plan("plain", plain(), False, (x,), False)

    def plain():
        order.append("plain")
        yield SimpleNamespace(wait=lambda: None)
        return Tensor(device)

    runner.start("all_reduce", Tensor(device)).wait()
    first.wait()
    assert order == ["coded", "plain"] and runner._thread.close(1)


def test_a_call_that_waits_for_the_thread_waits_for_the_calling_streams_work_too(device):
    runner, order = CodedRunner(device), []
    first = runner._thread.submit(lambda: (time.sleep(0.1), order.append("before")))
    x = Tensor(device)
    x.read = lambda: order.append(all(device.current_stream().clock[each] >= count for each, count in x.written.items()))
    runner._run(runner.planned("all_reduce", x))
    first.wait()
    assert order == ["before", True] and device.synchronized == [runner._side_stream] and runner._thread.close(1)


def test_a_coded_sum_that_fails_has_left_the_device_when_its_caller_hears_of_it(device):
    runner = CodedRunner(device, fails=True)
    x = Tensor(device)
    x.read = lambda: None
    with pytest.raises(RuntimeError, match="all_reduce: the device has gone"):
        runner.start("all_reduce", x).wait()
    assert device.synchronized == [runner._side_stream] and runner._thread.close(1)


class AwaitedRunner(CodedRunner):
    """Its sums are not over before `computed` is set, which takes a product that is made beside them."""

    def __init__(self, module):
        super().__init__(module)
        self.computed = threading.Event()

    def planned(self, operation, x, *, site=""):
        def steps():
            yield SimpleNamespace(wait=lambda: None)
            if not self.computed.wait(5):
                raise RuntimeError("nothing was computed beside the sum")
            return Tensor(self.module)

        return Plan("all_reduce", steps(), True, (x,), False, coded=True)


def test_taking_down_a_sum_that_the_host_does_to_its_end_does_not_wait_for_it(device):
    runner, recorder = AwaitedRunner(device), Recorder("cuda")
    wait = recorder.start(runner, "sum", 4, 0, "all_reduce", (Tensor(device),), {})
    second = recorder.start(runner, "sum again", 4, 1, "all_reduce", (Tensor(device),), {})
    time.sleep(0.02)
    with recorder.compute("product", 4):
        runner.computed.set()
    assert id(device.current_stream()) in wait().told and second()
    events = recorder.events()
    assert [event.name for event in events] == ["sum", "product", "sum again"] and recorder.overlapped
    summed, product, again = events
    assert summed.begin < product.begin < summed.end <= again.begin <= again.end and summed.end - summed.begin >= 0.02
    assert runner._thread.close(1)


def test_a_sum_on_a_stream_is_taken_down_by_the_devices_events(device):
    runner, recorder = Runner(device), Recorder("cuda")
    wait = recorder.start(runner, "sum", 4, 0, "all_reduce_rms_norm", (Tensor(device), Tensor(device)), {})
    with pytest.raises(AssertionError, match="before it was written"):
        wait.__self__._result[0].read()                                  # the marking stream has waited, the calling one has not
    wait()[0].read()
    (event,) = recorder.events()
    assert event.lane == "communication" and 0 <= event.begin <= event.end
