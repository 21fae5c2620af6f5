"""The order of a communicator's kernels on streams, and weaving with a few CTAs: without a GPU, by streams that keep the books.

A BookStream is a stream whose work is a list; an event is a place in it. What is ordered before what follows from the waits, as on a
device, and not from the order in which the host made the calls.
"""

import random
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hetero_attn_hopper.heap import Heap
from hetero_attn_hopper.lane import Mark
from hopper_emulated import EmulatedDevice, Node, emulated, emulated_profile
from native import needs_compiler
from schedule_models import TOLERANCE, family_decoder, run_batch

from hetero_attn.communicator import CommunicatorError
from hetero_attn.models.batch import Batch, Sequence
from hetero_attn.models.control import Driver
from hetero_attn.models.sampling import SamplingParams
from hetero_attn.models.schedule_ctas import Ctas, sweep_ctas
from hetero_attn.models.schedule_setup import make_schedule
from hetero_attn.parallel.schedule_choice import Given, Places, Schedule
from hetero_attn.profile import load_profile
from hetero_attn.testing.rank_threads import on_threads

pytestmark = needs_compiler


class Holder:
    def __init__(self, start=0, size=0):
        self.start, self.size = start, size


class BookStream:
    """Everything on it is a set of what it comes after."""

    def __init__(self, books, **_):
        self.books, self.seen = books, frozenset()

    def work(self, name):
        self.books.before[name] = self.seen
        self.seen = self.seen | {name}

    def record_event(self):
        return SimpleNamespace(seen=self.seen)

    def wait_event(self, event):
        self.seen = self.seen | event.seen

    def wait_stream(self, other):
        self.seen = self.seen | other.seen


class Books:
    """In torch.cuda's place: streams, and for each piece of work what is ordered before it."""

    def __init__(self):
        self.before, self.capturing = {}, 0              # the number of the capture
        self.main = self.current = BookStream(self)

    def Stream(self, device=None, priority=0):
        return BookStream(self)

    def current_stream(self, device=None):
        return self.current

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


class StreamDevice(EmulatedDevice):
    """An emulated device with books: a launch is noted on the stream that is current, and done at once."""

    def __init__(self, node, rank):
        super().__init__(node, rank)
        self.streams, self.launches = Books(), 0

    def capture(self, device):
        return self.streams.capturing

    def launch(self, kernel, grid, block, shared_bytes, call, device):
        self.launches += 1
        self.streams.current.work((f"launch {self.launches}", kernel.function, grid[0]))
        super().launch(kernel, grid, block, shared_bytes, call, device)


def on_streams(fn, **changes):
    """fn(communicator, books) on two ranks -> rank 0's result."""
    from hetero_attn_hopper.making import hopper_communicator

    node, devices = Node(2), {}

    def wrap(base):
        devices[base.rank] = StreamDevice(node, base.rank)
        return hopper_communicator(base, emulated_profile(**changes), devices[base.rank])

    outcomes = on_threads(lambda communicator: fn(communicator, devices[communicator.rank].streams), 2, wrap=wrap)
    assert not outcomes[0].error, outcomes[0].traceback
    return outcomes[0].result


def norm(communicator, form, site, rows=40):
    x = communicator.empty((rows, 16), torch.bfloat16).fill_(1)
    call = getattr(communicator, f"{form}all_reduce_rms_norm")
    return call(x, torch.zeros(communicator.row_counts(rows)[communicator.rank], 16), torch.ones(16), 1e-5, site=site)


def test_kernels_follow_one_another_whatever_streams_they_were_called_on():
    def run(communicator, books):
        handles = []
        for turn in range(3):
            books.main.work(f"product {turn}")
            handles.append(norm(communicator, "start_", "layers.0.o_proj"))
            communicator.all_reduce(torch.ones(600))
            other = books.Stream()
            with books.stream(other):
                communicator.all_reduce(torch.ones(10))
        for handle in handles:
            handle.wait()
        books.main.work("end")
        return books.before

    before = on_streams(run)
    launches = sorted((name for name in before if isinstance(name, tuple)), key=lambda name: int(name[0].split()[1]))
    assert len(launches) == 9
    for earlier, later in pairwise(launches):
        assert earlier in before[later], f"{later} does not wait for {earlier}"
    assert set(launches[:-1]) <= before["end"]          # the last is on a stream that nobody joined


def test_a_started_call_waits_for_what_was_there_and_nothing_later_waits_for_it_unasked():
    def run(communicator, books):
        books.main.work("its summand")
        handle = norm(communicator, "start_", "layers.0.o_proj")
        books.main.work("beside it")
        result = handle.wait()
        assert handle.wait() is result
        books.main.work("after it")
        return books.before

    before = on_streams(run)
    sum_ = next(name for name in before if isinstance(name, tuple))
    assert "its summand" in before[sum_] and "beside it" not in before[sum_]
    assert sum_ not in before["beside it"] and sum_ in before["after it"]


def test_started_sums_run_on_the_ctas_of_their_site():
    def run(communicator, books):
        communicator.use_ctas(3, 2)
        for form, site in (("start_", "layers.0.o_proj"), ("start_", "layers.0.down_proj"), ("", "layers.0.o_proj")):
            norm(communicator, form, site)
        with pytest.raises(ValueError, match="mlp_ctas is 33, the kernels take 2 to 32 CTAs"):
            communicator.use_ctas(None, 33)
        return [name[2] for name in books.before], communicator.cta_choices

    assert on_streams(run, **{"overlap.communication_units": 8}) == ([3, 2, 8], (2, 4, 8))


def test_memory_that_a_sum_still_uses_is_handed_out_behind_it():
    def run(communicator, books):
        handle = norm(communicator, "start_", "layers.0.o_proj", rows=8)
        del handle                                   # dropped unwaited: the place is free while the sum may still run
        first = {name for name in books.before if isinstance(name, tuple)}
        communicator.empty((8, 16), torch.bfloat16)
        books.main.work("writes there")
        communicator.empty((8, 16), torch.float32)   # elsewhere: no wait was needed for this one alone
        return first, books.before

    first, before = on_streams(run)
    assert len(first) == 1 and first <= before["writes there"]


def test_under_a_capture_only_what_it_captured_is_waited_for():
    def run(communicator, books):
        communicator.all_reduce(torch.ones(600))
        outside = set(books.before)
        books.capturing, books.current = 1, BookStream(books)       # torch.cuda.graph captures on a stream of its own
        kept = communicator.empty((8, 16), torch.bfloat16)
        norm(communicator, "start_", "layers.0.o_proj").wait()
        inside = set(books.before) - outside
        address = kept.data_ptr()
        del kept
        books.capturing, books.current = 0, books.main
        later = [communicator.empty((8, 16), torch.bfloat16) for _ in range(20)]
        communicator.all_reduce(torch.ones(600))
        last = next(name for name in books.before if name not in outside | inside)
        reused = address in [each.data_ptr() for each in later]
        return [outside & books.before[name] for name in inside], inside & books.before[last], reused

    waited, outside_waits, reused = on_streams(run)
    assert waited == [set()] and outside_waits == set() and not reused


def test_each_capture_waits_for_its_own_calls_alone():
    """One graph after the other, as for several batch sizes: an event of another capture may not be waited for."""
    def run(communicator, books):
        calls = []
        for capture in (1, 2):
            books.capturing, books.current = capture, BookStream(books)
            before = set(books.before)
            for _ in range(2):
                norm(communicator, "", "layers.0.o_proj")
            calls.append(sorted((name for name in set(books.before) - before), key=lambda name: int(name[0].split()[1])))
        return calls, books.before

    (first, second), before = on_streams(run)
    assert first[0] in before[first[1]] and second[0] in before[second[1]]
    assert not set(first) & (before[second[0]] | before[second[1]])


def test_calls_beside_a_capture_still_follow_one_another():
    def run(communicator, books):
        communicator.all_reduce(torch.ones(600))
        books.capturing, books.current = 1, BookStream(books)
        communicator.all_reduce(torch.ones(600))
        books.capturing, books.current = 0, BookStream(books)
        communicator.all_reduce(torch.ones(600))
        return books.before

    one, _, three = sorted((before := on_streams(run)), key=lambda name: int(name[0].split()[1]))
    assert one in before[three]


def test_a_call_started_under_a_capture_and_dropped_is_joined():
    def run(communicator, books):
        books.capturing, books.current = 1, BookStream(books)
        handle = norm(communicator, "start_", "layers.0.o_proj")
        del handle
        books.current.work("the capture's end")
        books.capturing, books.current = 0, books.main
        handle = norm(communicator, "start_", "layers.0.o_proj")
        del handle                                   # outside there is nothing to join
        books.main.work("later")
        return books.before

    before = on_streams(run)
    captured, free = sorted((name for name in before if isinstance(name, tuple)), key=lambda name: int(name[0].split()[1]))
    assert captured in before["the capture's end"] and free not in before["later"]


def test_memory_handed_out_on_one_stream_is_given_to_another_behind_it():
    def run(communicator, books):
        kept = communicator.empty((8, 16), torch.bfloat16)
        books.main.work("writes there")
        address = kept.data_ptr()
        del kept
        other = books.Stream()
        with books.stream(other):
            again = communicator.empty((8, 16), torch.bfloat16)
            other.work("writes there too")
        return again.data_ptr() == address, books.before

    same, before = on_streams(run)
    assert same and "writes there" in before["writes there too"]


def told_late(communicator, books):
    """A call whose kernel runs into the time-out after the host has gone on: what the device then writes."""
    norm(communicator, "", "layers.0.o_proj")
    number = communicator._number
    communicator._memory.status.fill_(1 << 56 | 1 << 48 | 0 << 40 | 1 << 32 | number)


def test_the_last_calls_time_out_is_told_when_results_are_read():
    def run(communicator, books):
        if communicator.rank:
            norm(communicator, "", "layers.0.o_proj")
            return None
        told_late(communicator, books)
        logits = torch.tensor([[0.0, 1.0], [1.0, float("nan")]])
        driver = Driver(SimpleNamespace(communicator=communicator, device=torch.device("cpu")))
        driver.cache = SimpleNamespace(num_blocks=9, block_size=16)
        driver.add_sequence, driver.forward = iter(range(9)).__next__, lambda *_: logits
        sequences = [Sequence(index, [1, 2], SamplingParams(), 4) for index in range(2)]
        batch = Batch(driver, sequences, max_batch=2, prefill_chunk=16)
        with pytest.raises(CommunicatorError, match=r"all_reduce_rms_norm of x \[40, 16\] bfloat16 at .*o_proj failed .*rank 1 did not"):
            batch.step()
        return driver.broken, [sequence.output for sequence in sequences]

    assert on_streams(run) == (True, [[], []])


def test_a_time_out_that_nobody_has_read_is_logged_by_close(caplog):
    def run(communicator, books):
        if communicator.rank == 0:
            told_late(communicator, books)
            communicator.close()
        else:
            norm(communicator, "", "layers.0.o_proj")

    on_streams(run)
    assert any("rank 1 did not come" in record.message and "found when the communicator was closed" in record.message
               for record in caplog.records)


def test_the_heap_gives_every_place_once_and_all_of_it_back():
    heap, draw, held = Heap(1024, 1024 + (1 << 16)), random.Random(3), {}
    for turn in range(3000):
        if held and draw.random() < 0.5:
            held.pop(draw.choice(list(held)))
            continue
        nbytes = draw.choice((1, 200, 256, 3000, 9000))
        found = heap.take(nbytes, Holder)
        if found is None:
            continue
        holder, place = found
        assert place.start % 256 == 0 and 1024 <= place.start and place.start + place.size <= 1024 + (1 << 16)
        assert all(place.start + nbytes <= other.start or other.start + other.size <= place.start for other in held.values())
        heap.used(place.start, Mark(turn, None, 0))
        assert heap.holds(place.start, nbytes, nbytes) and not heap.holds(place.start, nbytes + 1, nbytes + 1)
        held[turn] = holder
    del holder, found
    held.clear()
    _, place = heap.take(1 << 16, Holder)
    assert place.start == 1024 and place.after.number > 2000           # behind the last that used any of it


# ---- weaving -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama2", "gemma2"])
def test_a_woven_step_gives_the_plain_steps_numbers(name):
    """Whole decoders on the emulated kernels: parts and tiles, sums started on few CTAs, against layer after layer over the base."""
    past, new = [0, 3, 7], [19, 5, 9]

    def run(communicator, schedule, plain):
        decoder = family_decoder(name, communicator.base if plain else communicator)
        decoder.schedule = schedule
        return run_batch(decoder, past, new)

    node = Node(2)
    wrap = lambda base: emulated(base, node, **{"overlap.attention_ctas": 2, "overlap.mlp_ctas": 2})
    want = on_threads(run, 2, wrap=wrap, args=(Schedule(), True))
    assert not want[0].error, want[0].traceback
    for schedule in (Given([11, 20]), Given([16], [5, 25]), Given([16], (), lambda rows: (4, rows - 4))):
        found = on_threads(run, 2, wrap=wrap, args=(schedule, False))
        assert not found[0].error, found[0].traceback
        for got, expected in zip(found[0].result, want[0].result):
            assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert {function for _, function, _, _ in node.launched} >= {"hopper_all_reduce_rms_norm"}


def test_tune_finds_ctas_where_the_communicator_has_some(monkeypatch):
    """On a clock of our own, where 4 CTAs are best after an attention and 2 after an MLP."""
    from hetero_attn.models import schedule_ctas

    def clock(decoder, cuts, rounds, *, layers):
        now = decoder.communicator.ctas
        return {"weave": [1.0 + abs(now.attention - 4) + 0.5 * abs(now.mlp - 2)]}

    monkeypatch.setattr(schedule_ctas, "time_cuts", clock)

    def run(communicator):
        found = sweep_ctas(SimpleNamespace(communicator=communicator), Places(1, 1), 128, 2)
        return found.settings(), communicator.ctas[1:], found.as_text(), len(found.seconds)

    node = Node(2)
    outcomes = on_threads(run, 2, wrap=lambda base: emulated(base, node, **{"overlap.communication_units": 16}))
    settings, now, text, tried = outcomes[0].result
    assert settings == {"attention_ctas": 4, "mlp_ctas": 2} and now == (4, 2) and tried < 16 and text.endswith("best: 4/2")
    none = on_threads(lambda communicator: sweep_ctas(SimpleNamespace(communicator=communicator), Places(1, 1), 128, 2), 2)
    assert [outcome.result for outcome in none] == [None, None]
    assert Ctas(128, {(2, 2): 1.0, (4, 4): 1.0}).best == (2, 2)


def test_ctas_are_swept_for_real_on_the_emulated_kernels():
    node = Node(2)

    def run(communicator):
        decoder = family_decoder("llama2", communicator)
        return sweep_ctas(decoder, Places(1, 1), 16, 1).settings()

    outcomes = on_threads(run, 2, wrap=lambda base: emulated(base, node, **{"overlap.communication_units": 4}))
    assert not outcomes[0].error, outcomes[0].traceback
    assert outcomes[0].result == outcomes[1].result and set(outcomes[0].result.values()) <= {2, 4}


def test_a_profiles_ctas_reach_the_communicator_when_a_model_is_loaded():
    profile = load_profile("cpu", sets=["overlap.attention_ctas=4", "overlap.mlp_ctas=2", "schedule=plain"])

    def run(communicator):
        decoder = family_decoder("llama2", communicator)
        make_schedule(decoder, profile)
        return communicator.ctas

    node = Node(2)
    outcomes = on_threads(run, 2, wrap=lambda base: emulated(base, node, **{"overlap.communication_units": 8}))
    assert not outcomes[0].error, outcomes[0].traceback
    assert [outcome.result for outcome in outcomes] == [(8, 4, 2)] * 2
