"""Layers whose KV lies in host memory: the same logits wherever it lies, within a device memory that is enforced."""

import random
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers", reason="transformers writes the checkpoints these tests read")

from schedule_models import FAMILIES, family_decoder, random_batch, run_batch

from hetero_attn.communicator import SoloCommunicator
from hetero_attn.models.placing import make_placing
from hetero_attn.parallel import offload
from hetero_attn.parallel.schedule_choice import Given, Schedule
from hetero_attn.parallel.trace import FETCHES, HOST, LANES, STORES, Recorder, chrome_trace
from hetero_attn.profile import load_profile
from hetero_attn.registry import use_backend


def long_batch(draw: random.Random) -> tuple[list[int], list[int]]:
    """As random_batch, with sequences long enough for every way: chunks on the device, decoding on the host, both in one step."""
    past, new = random_batch(draw)
    return [min(2 * each, 23) for each in past], [min(each * draw.choice((1, 2)), 40) for each in new]


def alike(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_placement_changes_no_bit_of_the_logits(name):
    decoder, draw = family_decoder(name, SoloCommunicator()), random.Random(name)
    traffic = []
    for round_ in range(4):
        past, new = ([18, 0, 20], [19, 17, 1]) if not round_ else long_batch(draw)
        parts = [sum(new) // 3, sum(new) // 2]
        cut = (Given(parts, [sum(new) // 4]), Given(), Given(parts, (), lambda rows: (rows // 3, rows - rows // 3) if rows > 2 else ()))[
            round_ % 3]
        decoder.schedule, decoder.placing = cut, None
        expected = run_batch(decoder, past, new)
        for host in range(1, len(decoder.layers) + 1):
            decoder.placing = make_placing(decoder, decoder.profile, host, None)
            assert alike(run_batch(decoder, past, new), expected), (past, new, host)
            traffic.append(decoder.placing.traffic)
    assert all(each.stored for each in traffic[:2]) and traffic[0].fetched and traffic[0].crossed     # every way was taken


def test_another_backend_on_the_device_stays_within_its_tolerance():
    """What a GPU has: two kernels, one a side. Here torch's SDPA stands for the device's."""
    decoder = family_decoder("qwen3", SoloCommunicator())
    with use_backend("sdpa"):
        expected = run_batch(decoder, [18, 3], [20, 1])
        decoder.placing = make_placing(decoder, decoder.profile, 2, None)
        decoder.placing.host_profile = load_profile("cpu")
        found = run_batch(decoder, [18, 3], [20, 1])
    assert not alike(found, expected), "both sides ran the same kernel"
    for a, b in zip(found, expected):
        assert (a - b).abs().max() < 2e-5 * b.abs().max()


def test_a_trace_has_copies_and_host_attention_in_lanes_of_their_own():
    """Two chunks of a prompt and a decoded token, plain and cut: what was copied by which layer, and nothing in a lane at once."""
    decoder = six_layers()
    decoder.placing = make_placing(decoder, decoder.profile, 3, None)
    host = decoder.placing.place(decoder, 8, 1).host
    for schedule in (Schedule(), Given([11], [])):
        decoder.schedule, decoder.recorder = schedule, Recorder()
        cache = decoder.new_cache(64, 1)
        sequence, size = cache.add_sequence(), cache.block_size
        for tokens in (32, 20, 1):
            decoder(cache.step([sequence], [tokens], list(range(3, 3 + tokens))), cache)
        lanes = {lane: [event for event in decoder.recorder.events() if event.lane == lane] for lane in LANES}
        named = [f"layers.{layer}" for layer in host]
        held, new = -(-32 // size) * size, (-(-52 // size) - 32 // size) * size            # whole blocks: the past, the second chunk
        parts = 1 if schedule.name == "whole" else 2
        assert [(event.name, event.rows) for event in lanes[FETCHES]] == [(name, held) for name in named]
        assert [event.name for event in lanes[STORES]] == [name for _ in range(2) for name in named for _ in range(parts)]
        assert parts > 1 or [event.rows for event in lanes[STORES]][3:] == [new] * 3
        assert [(event.name, event.rows) for event in lanes[HOST]] == [(name, 1) for name in named]
        assert len(lanes["compute"]) == 6 * 3 if parts == 1 else len(lanes["compute"]) > 6 * 3
        copies = sorted(lanes[FETCHES] + lanes[STORES], key=lambda event: event.begin)                # one thread, where there is no device
        assert all(a.end <= b.begin for a, b in pairwise(copies)) and all(event.begin <= event.end for event in copies)
        shown = chrome_trace([decoder.recorder.events()])["traceEvents"]
        assert {event["args"]["name"] for event in shown if event["name"] == "thread_name"} == set(LANES)
    decoder.placing, decoder.recorder = make_placing(decoder, decoder.profile, 0, None), Recorder()
    decoder.schedule = Schedule()
    run_batch(decoder, [20], [20])
    assert not decoder.recorder.events()


# ---- the order of copies ------------------------------------------------------------------------------------------------------------


class LateLane:
    """A lane that does everything as late as it may: when somebody waits for it, or for something behind it."""

    def __init__(self, heeds_marks: bool = True) -> None:
        self.queue, self.heeds_marks = [], heeds_marks

    def start(self, work, after=()):
        mark = LateMark(self, work, tuple(after) if self.heeds_marks else ())
        self.queue.append(mark)
        return mark

    def keep(self, tensor):
        return tensor


class LateMark:
    def __init__(self, lane, work, after) -> None:
        self.lane, self.work, self.after, self.done = lane, work, after, False

    def wait(self):
        while not self.done:
            first = self.lane.queue.pop(0)
            for mark in first.after:
                mark.wait()
            first.work()
            first.done = True

    synchronize = wait


def late(monkeypatch, **options):
    monkeypatch.setattr(offload, "lanes", lambda device, count: [LateLane(**options) for _ in range(count)])


def logits_late(decoder):
    """Three chunks of one prompt, a conversation's turn, decoding: with every second layer's KV on the host."""
    return [part for past, new in (([20], [20]), ([40], [18]), ([5], [1])) for part in run_batch(decoder, past, new)]


def six_layers(family="llama2"):
    """More layers than buffers."""
    model_type, keys = FAMILIES[family]
    try:
        FAMILIES["six"] = model_type, keys | {"num_hidden_layers": 6}
        return family_decoder("six", SoloCommunicator())
    finally:
        del FAMILIES["six"]


def test_copies_may_come_as_late_as_their_marks_allow(monkeypatch):
    decoder = six_layers()
    expected = logits_late(decoder)
    late(monkeypatch)
    for host in (1, 2, 3, 5, 6):
        decoder.placing = make_placing(decoder, decoder.profile, host, None)
        assert alike(logits_late(decoder), expected), host


class Forgotten:
    """A mark that nobody waits for."""

    def __init__(self, mark, *names):
        self.mark, self.names = mark, names

    def __getattr__(self, name):
        return (lambda: None) if name in self.names else getattr(self.mark, name)


@pytest.mark.parametrize("fault", ["no wait for a fetch", "no wait for a store", "a fetch before the store it reads", "never stored",
                                   "one buffer for two layers", "window cut short"])
def test_a_missing_wait_is_caught(monkeypatch, fault):
    """Negative controls: with any one of these left out, late copies show in the logits."""
    decoder = six_layers("mistral" if fault == "window cut short" else "llama2")
    expected = logits_late(decoder)
    late(monkeypatch, heeds_marks=fault != "a fetch before the store it reads")
    start = LateLane.start
    if fault == "no wait for a fetch":
        monkeypatch.setattr(LateLane, "start", lambda self, work, after=(): Forgotten(start(self, work, ()), "wait"))
        monkeypatch.setattr(LateMark, "wait", lambda self: None)
    elif fault == "no wait for a store":
        monkeypatch.setattr(LateMark, "synchronize", lambda self: None)
    elif fault == "never stored":
        monkeypatch.setattr(offload, "_copy_runs", lambda into, source, runs: None)
    elif fault == "one buffer for two layers":
        made = offload.HostLayers.__init__

        def one_buffer(self, *arguments, **options):
            made(self, *arguments, **options)
            self._buffers = [self._buffers[0]] * len(self._buffers)

        monkeypatch.setattr(offload.HostLayers, "__init__", one_buffer)
        monkeypatch.setattr(offload, "lanes", lambda device, count: [EarlyLane()] * count)
    elif fault == "window cut short":
        from hetero_attn.models.cache import Step

        held = Step.held
        monkeypatch.setattr(Step, "held", lambda self, window=None: held(self, None if window is None else 1))
    decoder.placing = make_placing(decoder, decoder.profile, len(decoder.layers), None)
    assert not alike(logits_late(decoder), expected)


class EarlyLane:
    """A lane that does everything at once."""

    def start(self, work, after=()):
        work()
        return Forgotten(None, "wait", "synchronize")

    def keep(self, tensor):
        return tensor


def test_what_breaks_on_the_lane_reaches_the_caller(monkeypatch):
    decoder = six_layers()
    decoder.placing = make_placing(decoder, decoder.profile, 3, None)

    def broken(into, source, runs):
        raise OSError("the bus is on fire")

    monkeypatch.setattr(offload, "_copy_runs", broken)
    with pytest.raises(OSError, match="the bus is on fire"):
        run_batch(decoder, [20], [20])
