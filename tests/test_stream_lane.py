"""The communication lane on a device: its order of streams and events, held to happens-before by stand-ins for streams.

No device is here; what is tested (PlanRunner.start, StreamHandle) is the code that devices run, on streams that only take down who waits
for whom. A tensor knows where and when it was last written: whoever reads it on a stream that has not waited for that has found a race.
"""

import collections
import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

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

        self.Stream, self._current = Stream, [Stream()]
        outer.library = Stream()                                         # NCCL's or HCCL's own

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
