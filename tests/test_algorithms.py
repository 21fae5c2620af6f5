"""Every algorithm by its definition: any world size, any length, any dtype, the same bits everywhere; and its receives posted in time.

A network inside one process stands in for gloo here and is stricter: a message moves when its receive is posted and not before, its bytes
are read then (so a sender that writes too early is found out), and a rank that waits for what nobody sends is a deadlock, named. Real
gloo runs the same algorithms in the conformance suite (`distributed-one_shot` and so on) and at the end of this file.
"""

from __future__ import annotations

import collections
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_faults import check_common, survivors

from hetero_attn.collectives import algorithms
from hetero_attn.collectives.coding import PARTIAL, Coding, Plain, sum_in_rank_order
from hetero_attn.collectives.tree import family
from hetero_attn.collectives.wire import AHEAD_BYTES, LARGE_TAG, Wire, size_class
from hetero_attn.testing.ranks import on_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.int16)


class Message:
    """A send or a receive, done once it has met its counterpart."""

    def __init__(self, memory):
        self.memory, self.done = memory, False

    def wait(self, timeout=None):
        assert self.done, "waited for a message that has not moved: the scheduler resumed too early"


class Network:
    """Queues of unmatched sends and receives per (sender, receiver, tag)."""

    def __init__(self):
        self.sends, self.receives = collections.defaultdict(collections.deque), collections.defaultdict(collections.deque)
        self.moved, self.late = 0, 0

    def match(self, key):
        while self.sends[key] and self.receives[key]:
            source, target = self.sends[key].popleft(), self.receives[key].popleft()
            assert source.memory.numel() <= target.memory.numel(), "a message is longer than its receive"
            target.memory[: source.memory.numel()] = source.memory
            source.done = target.done = True
            self.moved += 1


class FakeWire(Wire):
    def __init__(self, rank, world_size, network):
        super().__init__(rank, world_size)
        self.network = network

    def _post(self, buffer, sender, tag):
        message = Message(buffer.fill_(0xA5))
        self.network.receives[sender, self.rank, tag].append(message)
        self.network.match((sender, self.rank, tag))
        return message

    def _transmit(self, payload, to, tag):
        message = Message(payload)
        self.network.late += not self.network.receives[self.rank, to, tag]
        self.network.sends[self.rank, to, tag].append(message)
        self.network.match((self.rank, to, tag))
        return message


def run(generators, order=None):
    """Step all ranks' generators to their ends, a rank only when all it waits for has moved; their results. order: who is tried first."""
    ranks = list(order or range(len(generators)))
    waiting, results = dict.fromkeys(ranks), {}
    while len(results) < len(ranks):
        before = len(results), sum(id(works) for works in waiting.values() if works)
        progressed = False
        for rank in ranks:
            if rank in results or (waiting[rank] is not None and not all(work.done for work in waiting[rank]._works)):
                continue
            progressed = True
            try:
                if waiting[rank] is not None:
                    waiting[rank].wait()
                waiting[rank] = next(generators[rank])
            except StopIteration as done:
                results[rank] = done.value
        assert progressed, f"deadlock: ranks {[rank for rank in ranks if rank not in results]} wait for each other; {before}"
    return [results[rank] for rank in range(len(ranks))]


def inputs(world_size, count, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return [torch.randn(count, generator=generator, dtype=torch.float64).to(dtype) for _ in range(world_size)]
    return [torch.randint(0, 100, (count,), generator=generator).to(dtype) for _ in range(world_size)]


def assert_sum(actual, parts, dtype):
    """In rank order exactly for the algorithms that promise it; here within one rounding of the fp64 sum."""
    if not dtype.is_floating_point:
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        assert torch.equal(actual, total)
        return
    exact = torch.stack([part.double() for part in parts]).sum(0)
    magnitude = torch.stack([part.double().abs() for part in parts]).sum(0)
    rounding = {torch.float32: 2**-22, torch.float64: 2**-50}.get(dtype)
    bound = magnitude * (rounding or 2**-20) + (0 if rounding else exact.abs() * torch.finfo(dtype).eps * 0.5001)
    assert ((actual.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("algorithm", algorithms.NAMES)
@settings(max_examples=60, deadline=None)
@given(
    world_size=st.integers(1, 9), lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31), order=st.randoms(use_true_random=False),
)
def test_all_reduce(algorithm, world_size, lengths, dtype, seed, order):
    """Several calls of unlike lengths over one wire, the ranks advancing in any order."""
    network = Network()
    wires = [FakeWire(rank, world_size, network) for rank in range(world_size)]
    for call, count in enumerate(lengths):
        parts = inputs(world_size, count, dtype, seed + call)
        flats = [part.clone() for part in parts]
        ranks = list(range(world_size))
        order.shuffle(ranks)
        run([algorithms.all_reduce(algorithm, wires[rank], Plain(dtype), flats[rank]) for rank in range(world_size)], ranks)
        assert all(torch.equal(flat.view(torch.uint8), flats[0].view(torch.uint8)) for flat in flats), "the ranks' bits differ"
        if algorithm in ("one_shot", "two_shot", "star"):
            assert torch.equal(flats[0], sum_in_rank_order(parts, dtype))
        assert_sum(flats[0], parts, dtype)


@pytest.mark.parametrize("algorithm", algorithms.NAMES)
@settings(max_examples=40, deadline=None)
@given(world_size=st.integers(1, 9), counts=st.data(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_reduce_scatter_and_all_gather(algorithm, world_size, counts, dtype, seed):
    """Pieces of any length at any rank, none among them."""
    counts = counts.draw(st.lists(st.integers(0, 9), min_size=world_size, max_size=world_size).filter(sum))
    network = Network()
    wires = [FakeWire(rank, world_size, network) for rank in range(world_size)]
    parts = inputs(world_size, sum(counts), dtype, seed)
    before = [part.clone() for part in parts]
    owns = run([algorithms.reduce_scatter(algorithm, wires[rank], Plain(dtype), parts[rank], counts) for rank in range(world_size)])
    assert [own.numel() for own in owns] == counts and all(own.dtype == dtype for own in owns)
    assert all(torch.equal(part, kept) for part, kept in zip(parts, before)), "an input was written"
    assert_sum(torch.cat(owns), parts, dtype)
    outs = [torch.zeros(sum(counts) * dtype.itemsize, dtype=torch.uint8) for _ in range(world_size)]
    sizes = [count * dtype.itemsize for count in counts]
    run([algorithms.all_gather(algorithm, wires[rank], owns[rank].view(torch.uint8), sizes, outs[rank]) for rank in range(world_size)])
    assert all(torch.equal(out.view(dtype), torch.cat(owns)) for out in outs)


@pytest.mark.parametrize("algorithm", algorithms.NAMES)
@settings(max_examples=40, deadline=None)
@given(world_size=st.integers(2, 9), src=st.integers(0, 8), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_broadcast(algorithm, world_size, src, lengths):
    src %= world_size
    network = Network()
    wires = [FakeWire(rank, world_size, network) for rank in range(world_size)]
    for count in lengths:
        flats = [torch.full((count,), rank, dtype=torch.uint8) for rank in range(world_size)]
        run([algorithms.broadcast(algorithm, wires[rank], flats[rank], src) for rank in range(world_size)])
        assert all((flat == src).all() for flat in flats)


@pytest.mark.parametrize("algorithm", algorithms.NAMES)
def test_receives_are_posted_before_the_peers_send(algorithm):
    """After the first call of a size class no message waits for its receive, whichever rank is fastest, also when lengths change."""
    world_size, network = 4, Network()
    wires = [FakeWire(rank, world_size, network) for rank in range(world_size)]
    for call, count in enumerate((8000, 8000, 8000, 5000, 8192)):
        network.late = network.moved = 0
        flats = [torch.ones(count) for _ in range(world_size)]
        ranks = [(rank + call) % world_size for rank in range(world_size)]
        run([algorithms.all_reduce(algorithm, wires[rank], Plain(torch.float32), flats[rank]) for rank in range(world_size)], ranks)
        assert network.moved > 0 and (network.late == 0 or call == 0)


def test_memory_is_used_again():
    """A thousand calls of one size take the buffers of the first few."""
    network = Network()
    wires = [FakeWire(rank, 3, network) for rank in range(3)]
    seen = set()
    for _ in range(50):
        run([algorithms.all_reduce("two_shot", wire, Plain(torch.float32), torch.ones(900)) for wire in wires])
        seen |= {queue[0].memory.data_ptr() for queue in network.receives.values() if queue}
    assert len(seen) <= 3 * 2 * 4


def test_size_classes():
    assert size_class(1) == size_class(256) == 8 and size_class(257) == 9
    assert size_class(AHEAD_BYTES) == 18 and size_class(AHEAD_BYTES + 1) == LARGE_TAG
    assert all(1 << size_class(nbytes) >= nbytes for nbytes in range(1, 5000))


@pytest.mark.parametrize("world_size", range(1, 20))
def test_tree_is_a_tree(world_size):
    """Every rank but 0 is one rank's child, and subtrees are the runs they are said to be."""
    children = {rank: family(rank, world_size)[1] for rank in range(world_size)}
    assert sorted(child for each in children.values() for child, _ in each) == list(range(1, world_size))

    def subtree(rank):
        return {rank}.union(*(subtree(child) for child, _ in children[rank]))

    for rank, each in children.items():
        assert all(family(child, world_size)[0] == rank and subtree(child) == set(range(child, end)) for child, end in each)


class Halves(Coding):
    """A lossy stand-in for a codec: fp32 values as bf16, with the sender and the place checked in a header of its own."""

    def size(self, first, count, stage=PARTIAL):
        return 8 + 2 * count

    def encode(self, values, first, stage=PARTIAL):
        head = torch.tensor([first, len(values)], dtype=torch.int32).view(torch.uint8)
        return torch.cat([head, values.to(torch.bfloat16).view(torch.uint8)])

    def decode(self, payload, sender, first, count, stage=PARTIAL):
        assert payload[:8].view(torch.int32).tolist() == [first, count]
        return payload[8:].view(torch.bfloat16).float()


@pytest.mark.parametrize("algorithm", algorithms.CODED)
@pytest.mark.parametrize("count", [1, 3, 50])
def test_a_lossy_coding_leaves_the_same_bits_everywhere(algorithm, count):
    network = Network()
    wires = [FakeWire(rank, 5, network) for rank in range(5)]
    parts = inputs(5, count, torch.float32, 3)
    flats = [part.clone() for part in parts]
    run([algorithms.all_reduce(algorithm, wire, Halves(), flat) for wire, flat in zip(wires, flats)])
    assert all(torch.equal(flat, flats[0]) for flat in flats)
    coded = sum_in_rank_order([part.bfloat16().float() for part in parts], torch.float32)        # its own summand is coded too
    assert torch.equal(flats[0], coded if algorithm == "one_shot" else coded.bfloat16().float())


@pytest.mark.parametrize("algorithm", ["ring", "tree"])
def test_no_codec_on_travelling_sums(algorithm):
    with pytest.raises(ValueError, match="one_shot"):
        algorithms.all_reduce(algorithm, FakeWire(0, 2, Network()), Halves(), torch.ones(3))


def test_the_network_sees_faults():
    """Negative control: a rank that expects what nobody sends, and one that writes before its message has moved."""
    network = Network()
    wires = [FakeWire(rank, 2, network) for rank in range(2)]
    with pytest.raises(AssertionError, match="deadlock"):
        run([algorithms.broadcast("one_shot", wires[0], torch.ones(4, dtype=torch.uint8), 1),
             algorithms.broadcast("one_shot", wires[1], torch.ones(4, dtype=torch.uint8), 0)])
    network = Network()
    sender, receiver = (FakeWire(rank, 2, network) for rank in range(2))
    payload = torch.ones(4, dtype=torch.uint8)
    sender.send(payload, 1)
    payload.fill_(7)                                 # too early
    arrival = receiver.expect(0, 4)
    assert (arrival.payload == 7).all()


# ---- real ranks over gloo


def shapes_and_orders(communicator):
    """Mixed operations, sizes and dtypes; handles that nobody waits for; then an end that each rank reaches at a time of its own."""
    world, rank = communicator.world_size, communicator.rank
    for turn, count in enumerate((1, 5000, 64, 70_000, 300, 5000, 200_000, 3)):
        total = communicator.all_reduce(torch.full((count,), float(rank + turn)))
        assert (total == sum(each + turn for each in range(world))).all(), (turn, count)
        gathered = communicator.all_gather(torch.full((rank, 2), rank))
        assert gathered[:, 0].tolist() == [each for each in range(world) for _ in range(each)]
    for _ in range(700):
        communicator.start_all_reduce(torch.ones(50))
    assert len(communicator._in_flight) < 400
    assert (communicator.all_reduce(torch.ones(1 << 19)) == world).all()       # long last messages, partly still in the kernel
    sent = communicator.bytes_sent
    communicator.all_reduce(torch.ones(1000))
    time.sleep(0.3 * rank)
    began = time.monotonic()
    communicator.close()
    return communicator.bytes_sent - sent, time.monotonic() - began


@pytest.mark.ranks
@pytest.mark.parametrize("algorithm", algorithms.NAMES)
def test_over_gloo_and_out_again(algorithm, capfd):
    """Real ranks end quietly, with receives still posted, whoever is first to leave."""
    outcomes = on_ranks(shapes_and_orders, (), 2, communicator=f"distributed-{algorithm}")
    assert not any(outcome.error for outcome in outcomes), outcomes
    results = [outcome.result for outcome in outcomes]
    assert [sent for sent, _ in results] == [4000, 4000]               # between two ranks each sends the whole once, whatever the algorithm
    assert max(took for _, took in results) < 2.5
    assert capfd.readouterr().err == ""


@pytest.mark.ranks
@pytest.mark.parametrize("algorithm", ["one_shot", "star"])
def test_survivors_name_the_missing_rank(monkeypatch, tmp_path, algorithm):
    monkeypatch.setenv("HETERO_ATTN_SET", f"algorithm={algorithm}")
    seen, failure = survivors(monkeypatch, tmp_path, "killed", 3)
    assert (failure.rank, failure.reason) == (1, "ended by SIGKILL")
    for rank, saw in seen.items():
        check_common(rank, 3, saw)
        assert saw["missing"] == [1] and saw["operation"].startswith("all_reduce of x [") and "rank 1 does not answer" in saw["text"]


@pytest.mark.ranks
def test_a_late_rank_is_alive(monkeypatch, tmp_path):
    """Its peer's time is up: the error names rank and operation, and says that nobody has died."""
    monkeypatch.setenv("HETERO_ATTN_SET", "algorithm=two_shot")
    seen, _ = survivors(monkeypatch, tmp_path, "late", 2)
    check_common(0, 2, seen[0])
    assert seen[0]["missing"] == [] and "every rank is alive" in seen[0]["text"] and seen[0]["took"] < 8.0
