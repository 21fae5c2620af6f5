"""Kernels are told when communication runs beside them, and what they then do changes no bit."""

import threading

import pytest
import torch

from hetero_attn import in_flight, registry
from hetero_attn.collectives.background import CommunicationThread


@pytest.fixture
def told(monkeypatch):
    heard = []
    monkeypatch.setattr(in_flight, "_watchers", [*in_flight._watchers, heard.append])
    return heard


def test_watchers_hear_of_the_first_and_of_the_last_call(told):
    thread, go = CommunicationThread(), threading.Event()
    first = thread.submit(go.wait)
    second = thread.submit(lambda: 1 / 0)                # a failure is an end too
    assert told == [True]
    late = []
    in_flight.watch(late.append)
    in_flight._watchers.remove(late.append)
    go.set()
    first.wait()
    with pytest.raises(ZeroDivisionError):
        second.wait()
    assert thread.close(5) and told == [True, False] and late == [True]


def test_a_kernel_that_offers_the_processor_gives_the_same_bits():
    backend = registry.get("cpu")
    if reasons := backend.unavailable_reasons():
        pytest.skip("; ".join(reasons))
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(70, 300, generator=generator), torch.randn(200, 300, generator=generator)
    expected = backend.linear(x, weight)
    in_flight.begin()
    try:
        assert torch.equal(backend.linear(x, weight), expected)
    finally:
        in_flight.end()
