"""Generation over real ranks: the same text, no token id on the wire under 'master', and workers that are always released."""

import time

import pytest
import torch
from tiny_checkpoint import write_checkpoint

from hetero_attn.collectives import init_communicator
from hetero_attn.communicator import Communicator, SoloCommunicator
from hetero_attn.models.config import ModelError
from hetero_attn.models.control import HEADER_WORDS, Driver, receive, send, serve
from hetero_attn.models.generate import GenerationStream, generate
from hetero_attn.models.load import load_model
from hetero_attn.models.sampling import SamplingParams
from hetero_attn.parallel.launch import RankFailure, run_ranks
from hetero_attn.profile import load_profile

pytestmark = pytest.mark.ranks

# Token ids from 200 up: whatever passes between ranks and is an integer below 200 cannot be one of them.
PROMPTS = [[200 + 7 * i % 120 for i in range(90)], [319, 250], [201] * 17]
MANY = [[210 + number] for number in range(40)]                  # 40 sequences: a control record larger than its header
GREEDY, SAMPLED = SamplingParams(max_new_tokens=8), SamplingParams(max_new_tokens=8, temperature=1.0, top_k=20, seed=3)
TIMEOUT_S = 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


class Recorder(Communicator):
    """Passes everything on and keeps what this rank received: every integer, and the shapes of the rest."""

    def __init__(self, base):
        super().__init__(base.rank, base.world_size, device=base.device, base=base)
        self.forget()

    def forget(self):
        self.integers, self.shapes, self.record_sizes = set(), set(), set()

    def all_reduce(self, x, *, site=""):
        return self._kept(super().all_reduce(x, site=site), site)

    def all_gather(self, x, dim=0, *, sizes=None, site=""):
        return self._kept(super().all_gather(x, dim, sizes=sizes, site=site), site)

    def broadcast(self, x, src=0, *, site=""):
        return self._kept(super().broadcast(x, src, site=site), site)

    def _kept(self, x, site):
        if x.is_floating_point():
            self.shapes.add(x.shape[-1])
        else:
            self.integers.update(x.flatten().tolist())
            self.record_sizes.add(x.numel())
        return x


def ids(results):
    return [result.token_ids for result in results]


def in_ranks(folder):
    """What one rank saw, and rank 0's results, for both vocabularies on one group."""
    seen = {}
    with init_communicator("cpu", timeout_s=TIMEOUT_S) as base:
        for vocabulary in ("master", "sharded"):
            recorder = Recorder(base)
            profile = load_profile("cpu", sets=["prefill_chunk=40"])
            model = load_model(folder, profile, communicator=recorder, vocabulary=vocabulary)
            recorder.forget()                                    # what load_model compared between ranks
            results = [                                          # every rank makes the same calls; rank 0 has the results
                ids(generate(model, PROMPTS, GREEDY)),
                ids(generate(model, PROMPTS, SAMPLED, max_batch=2)),
                ids(generate(model, MANY, SamplingParams(max_new_tokens=2), max_batch=40)),
            ]
            seen[vocabulary] = (results, sorted(recorder.integers), sorted(recorder.shapes), sorted(recorder.record_sizes))
        seen["released"] = released(model) if base.rank == 0 else sum(serve(model) is None for _ in range(6))
    return seen


def released(model):
    """Six ways to end a generation on rank 0; a worker counts how often its serve() returned."""
    def fail(error):
        def callback(piece):
            raise error
        return callback

    for error in (RuntimeError("consumer"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            generate(model, PROMPTS, GREEDY, stream=fail(error))
    with pytest.raises(ModelError, match="longer than the model's context"):
        generate(model, [[3] * 1000])
    stream = GenerationStream(model, PROMPTS, GREEDY)
    next(stream)
    del stream
    never_started = GenerationStream(model, PROMPTS, GREEDY)
    del never_started
    with Driver(model) as driver:                                # workers wait as long as rank 0 lives, far beyond the time-out
        first = generate(model, PROMPTS, GREEDY, driver=driver)
        time.sleep(TIMEOUT_S + 1)
        assert ids(first) == ids(generate(model, PROMPTS, GREEDY, driver=driver))
    return 6


def test_three_ranks_give_the_text_of_one_and_keep_their_secrets(folder):
    solo = load_model(folder, "cpu", communicator=SoloCommunicator())
    expected = [ids(generate(solo, PROMPTS, GREEDY)), ids(generate(solo, PROMPTS, SAMPLED)),
                ids(generate(solo, MANY, SamplingParams(max_new_tokens=2)))]
    ranks = run_ranks(in_ranks, (folder,), 3)
    for vocabulary in ("master", "sharded"):
        assert ranks[0][vocabulary][0] == expected
        for worker in ranks[1:]:
            results, integers, shapes, sizes = worker[vocabulary]
            assert results == [[], [], []]
            assert HEADER_WORDS in sizes and len(sizes) > 1            # records of several sizes came through
            assert 48 in shapes                                        # hidden states did pass here
            if vocabulary == "master":
                assert integers[-1] < 200 and set(shapes) == {48}      # lengths and hidden states, no token id, no logits
            else:
                assert {token for prompt in PROMPTS for token in prompt} <= set(integers)          # the check can tell: here they are
    assert [rank["released"] for rank in ranks] == [6, 6, 6]


def break_off(folder):
    communicator = init_communicator("cpu", timeout_s=30)
    model = load_model(folder, "cpu", communicator=communicator)
    if communicator.rank == 0:
        model.layers[1].mlp.forward = lambda x: 1 / 0                  # in the middle of a step, the other rank waiting in its collective
        try:
            generate(model, PROMPTS, GREEDY)
        finally:
            time.sleep(1)                                              # so that it is not this process's end that the other one notices
    else:
        serve(model)


def test_an_error_inside_a_step_ends_all_ranks_and_is_the_one_reported(folder):
    started = time.monotonic()
    with pytest.raises(RankFailure, match="rank 0 failed: ZeroDivisionError"):
        run_ranks(break_off, (folder,), 2)
    assert time.monotonic() - started < 28                             # not by the time-out


class Wire:
    """Two ends of a group in one process: what rank 0 broadcasts, the other reads."""

    def __init__(self, world_size=2):
        self.world_size, self.rank, self.sent, self.reading = world_size, 0, [], False

    def await_signal(self, src=0, *, site=""):
        pass

    def broadcast(self, x, src=0, *, site=""):
        if self.reading:
            return x.copy_(self.sent.pop(0))                           # fails unless the sizes agree
        self.sent.append(x.clone())
        return x


@pytest.mark.parametrize("words", [0, 1, HEADER_WORDS - 3, HEADER_WORDS - 2, HEADER_WORDS - 1, HEADER_WORDS, 1000])
def test_records_of_any_length_arrive_whole(words):
    wire, body = Wire(), list(range(5, 5 + words))
    send(wire, torch.device("cpu"), 4, body)
    assert wire.sent[0].numel() == HEADER_WORDS and len(wire.sent) == (1 if words + 2 <= HEADER_WORDS else 2)
    wire.reading = True
    assert receive(wire, torch.device("cpu")) == (4, body)
