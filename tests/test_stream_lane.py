"""The communication lane on a device: its order of streams and events, held to happens-before by stand-ins for streams.

No device is here; what is tested (PlanRunner.start, StreamHandle) is the code that devices run, on streams that only take down who waits
for whom. A tensor knows where and when it was last written: whoever reads it on a stream that has not waited for that has found a race.
"""

import collections
import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from hetero_attn.collectives.background import CommunicationThread
from hetero_attn.collectives.plans import Plan
from hetero_attn.collectives.runner import PlanRunner
from hetero_attn.parallel.schedule import CommunicationLane


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

        self.Stream, self._current = Stream, [Stream()]
        outer.library = Stream()                                         # NCCL's or HCCL's own
        outer.synchronized = []

    def current_stream(self):
        return self._current[-1]

    @contextlib.contextmanager
    def stream(self, stream):
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()


class Tensor:
    """What a stream wrote; the streams that the allocator was told of."""

    device, shape, is_inference = SimpleNamespace(type="fake"), (4, 8), staticmethod(lambda: False)

    def __init__(self, device):
        self.module, self.home, self.told = device, device.current_stream(), set()
        self.write()

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
        self._closed = self._left = False
        self._calls = self._finished = 0
        self._failing, self._exchange = threading.Lock(), SimpleNamespace(is_native=lambda x: True)
        self._thread = SimpleNamespace(busy=lambda: False)

    def planned(self, operation, x, residual, *, site=""):
        def steps():
            x.read()
            self.module.library.wait_stream(self.module.current_stream())
            event = self.module.library.record_event()
            yield SimpleNamespace(wait=lambda: self.module.current_stream().wait_event(event))
            residual.read()
            residual.write()
            return Tensor(self.module), residual

        return Plan("all_reduce_rms_norm", steps(), False, (x, residual), False)


@pytest.fixture
def device(monkeypatch):
    made = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: made)
    return made


def test_two_parts_wait_for_their_own_sums_and_for_nothing_else(device):
    """Two parts through four blocks as run_blocks does it: products on the calling stream, sums on the side stream."""
    runner = Runner(device)
    lane, residuals = CommunicationLane(runner, asynchronous=True), [Tensor(device), Tensor(device)]
    coming = [None, None]
    for _ in range(4):
        for part in (0, 1):
            if coming[part] is not None:
                coming[part]().read()
            known = device.current_stream().clock.copy()
            summand = Tensor(device)                                     # a product: it runs while the other part's sum is under way
            coming[part] = lane.start("sum", part, "all_reduce_rms_norm", summand, residuals[part])
            assert all(device.current_stream().clock[each] == known[each] for each in known if each != id(device.current_stream()))
    assert id(runner._side_stream) in residuals[0].told
    for arrive in coming:
        arrive().read()


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
