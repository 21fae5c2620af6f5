"""Generation on one rank: equal to transformers whatever the batching, every way to end, and a cache that is given back.

The same over several ranks is in test_generate_ranks.py.
"""

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch
from tiny_checkpoint import write_checkpoint, write_tokenizer

from hetero_attn.communicator import SoloCommunicator
from hetero_attn.models.config import ModelError
from hetero_attn.models.control import Driver
from hetero_attn.models.conversation import Conversation
from hetero_attn.models.generate import GenerationStream, generate
from hetero_attn.models.load import load_model
from hetero_attn.models.sampling import SamplingParams
from hetero_attn.models.tokenizer import Tokenizer
from hetero_attn.profile import load_profile

PROMPTS = ["Hello world", "def add(a, b):\n    return a + b\n" * 3, "", "naïve 東京 🙂"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def load(folder, *sets):
    return load_model(folder, load_profile("cpu", sets=sets), communicator=SoloCommunicator())


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def expected(folder, tokenizer):
    """transformers' own greedy token ids of each prompt, one prompt at a time."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def tokens(prompt, new, **options):
        ids = tokenizer.encode(prompt)
        whole = theirs.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=1, **options)
        return tuple(whole[0, len(ids):].tolist())

    return tokens


@pytest.mark.parametrize("sets", [(), ("prefill_chunk=5", "kv_block_size=3"), ("prefill_chunk=1", "kv_block_size=16")])
@pytest.mark.parametrize("bounds", [{}, {"max_batch": 2}, {"cache_tokens": 100}])
def test_greedy_equals_transformers_however_it_is_batched(folder, expected, sets, bounds):
    results = generate(load(folder, *sets), PROMPTS, SamplingParams(max_new_tokens=12), **bounds)
    assert [result.index for result in results] == [0, 1, 2, 3]
    for prompt, result in zip(PROMPTS, results):
        assert result.token_ids == expected(prompt, 12)
        assert 0 < result.first_token_s <= result.total_s


def test_repetition_penalty_equals_transformers(model, expected):
    (result,) = generate(model, PROMPTS[1:2], SamplingParams(max_new_tokens=20, repetition_penalty=1.6))
    assert result.token_ids == expected(PROMPTS[1], 20, repetition_penalty=1.6) != expected(PROMPTS[1], 20)


def test_sampled_text_depends_on_seed_and_index_not_on_the_batch(folder, model):
    params = SamplingParams(max_new_tokens=15, temperature=0.9, top_p=0.95, seed=7)
    whole = generate(model, PROMPTS, params)
    narrow = generate(load(folder, "prefill_chunk=3"), PROMPTS, params, max_batch=1)
    assert [result.token_ids for result in whole] == [result.token_ids for result in narrow]
    assert whole[0].token_ids == generate(model, PROMPTS[:1], params)[0].token_ids
    assert whole[0].token_ids != generate(model, PROMPTS[:1], dataclasses.replace(params, seed=8))[0].token_ids
    twice = generate(model, [PROMPTS[0]] * 2, params)
    assert twice[0].token_ids != twice[1].token_ids                       # two samples of one prompt are two samples


def test_pieces_joined_are_the_text_and_the_text_is_the_tokens(model, tokenizer):
    pieces = {index: "" for index in range(len(PROMPTS))}
    params = SamplingParams(max_new_tokens=25, temperature=1.5, seed=1)
    results = generate(model, PROMPTS, params, stream=lambda piece: pieces.__setitem__(piece.index, pieces[piece.index] + piece.text))
    for result, prompt in zip(results, PROMPTS):
        ids = tokenizer.encode(prompt)
        assert pieces[result.index] == result.text == tokenizer.decode_continuation(ids, result.token_ids)
        assert result.prompt_tokens == len(ids)


def test_each_prompt_has_its_own_parameters(model, expected):
    results = generate(model, PROMPTS[:2], [SamplingParams(max_new_tokens=3), SamplingParams(max_new_tokens=9)])
    assert [result.token_ids for result in results] == [expected(PROMPTS[0], 3), expected(PROMPTS[1], 9)]
    with pytest.raises(ValueError, match="params has 1 entries for 2 prompts"):
        generate(model, PROMPTS[:2], [SamplingParams()])


def test_end_of_sequence_ids_and_ignoring_them(tmp_path, folder, tokenizer, expected):
    free = expected(PROMPTS[0], 30)
    end = free[9]
    first = free.index(end)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for form in (end, [317, end]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": form}))
        model = load(tmp_path)
        (result,) = generate(model, PROMPTS[:1], SamplingParams(max_new_tokens=30))
        assert (result.token_ids, result.finish_reason) == (free[: first + 1], "eos")
        assert result.text == tokenizer.decode_continuation(tokenizer.encode(PROMPTS[0]), free[:first])
        (result,) = generate(model, PROMPTS[:1], SamplingParams(max_new_tokens=30, ignore_eos=True))
        assert (result.token_ids, result.finish_reason) == (free, "length")


def test_stop_strings_end_the_text_before_them_and_are_never_shown(model):
    (free,) = generate(model, PROMPTS[:1], SamplingParams(max_new_tokens=40))
    for start, width in ((4, 3), (10, 5), (0, 1)):
        stop = free.text[start : start + width]
        stopping = SamplingParams(max_new_tokens=40, stop=(stop, "never there"))
        pieces = list(GenerationStream(model, PROMPTS[:1], stopping))
        result, shown = pieces[-1].done, [piece.text for piece in pieces]
        assert result.finish_reason == "stop"
        assert result.text == free.text[: free.text.index(stop)] == "".join(shown)
        assert free.token_ids[: len(result.token_ids)] == result.token_ids and len(result.token_ids) < 40
    (result,) = generate(model, PROMPTS[:1], SamplingParams(max_new_tokens=40, stop=(free.text[-1:] + "x",)))
    assert (result.text, result.finish_reason) == (free.text, "length")           # held back to the end, then shown


def test_the_context_bounds_a_sequence(model, expected):
    context = model.config.context_length
    prompt = [5] * (context - 3)
    (result,) = generate(model, [prompt], SamplingParams(max_new_tokens=50))
    assert (len(result.token_ids), result.finish_reason) == (4, "length")         # the last token needs no place
    (result,) = generate(model, [[5] * context], SamplingParams(max_new_tokens=50))
    assert len(result.token_ids) == 1


def test_wrong_requests_are_refused_before_any_work(model, tmp_path, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *a: pytest.fail("the model ran"))
    context = model.config.context_length
    for prompts, words in (
        (["ok", [1] * (context + 5)], f"prompt 2 of 2 has {context + 5} tokens, longer than the model's context of {context}"),
        ([[1, 320]], "token id 320, the model's vocabulary is 0 to 319"),
        ([[-1]], "token id -1"),
    ):
        with pytest.raises(ModelError, match=words):
            generate(model, prompts)
    with pytest.raises(TypeError, match="expected a list of texts"):
        generate(model, "a text")
    with pytest.raises(ModelError, match="needs a cache of 40 tokens, cache_tokens is 20"):
        generate(model, [[3]], SamplingParams(max_new_tokens=40), cache_tokens=20)
    with pytest.raises(ValueError, match="max_batch is 0"):
        generate(model, [[3]], max_batch=0)
    without = Tokenizer.from_dir(write_tokenizer(tmp_path, bos_token=None))
    without._backend.post_processor = None
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, bos_id=None))
    with pytest.raises(ModelError, match="the prompt is empty"):
        generate(model, [""], tokenizer=without)


def test_an_empty_prompt_starts_from_bos_and_no_tokens_may_be_asked_for(folder):
    model, five = load(folder), SamplingParams(max_new_tokens=5)
    assert generate(model, [[]], five)[0].token_ids == generate(model, [[0]], five)[0].token_ids == generate(model, [""], five)[0].token_ids
    (result,) = generate(model, ["x"], SamplingParams(max_new_tokens=0))
    assert (result.text, result.token_ids, result.finish_reason) == ("", (), "length")
    assert generate(model, []) == []


def test_sequences_give_their_blocks_back_as_they_end(folder):
    model, lengths = load(folder, "kv_block_size=4"), [2, 30, 5, 11]
    with Driver(model) as driver:
        held = []
        params = [SamplingParams(max_new_tokens=length) for length in lengths]
        results = generate(model, [[7, 8, 9]] * 4, params, driver=driver,
                           stream=lambda piece: piece.done and held.append(len(driver.cache.sequences)))
        assert [len(result.token_ids) for result in results] == lengths
        assert held == [3, 2, 1, 0] and driver.cache.free_blocks == driver.cache.num_blocks


def test_prompts_wait_for_room_instead_of_failing(folder):
    model, most = load(folder, "kv_block_size=4"), 0
    with Driver(model) as driver:
        def watch(piece):
            nonlocal most
            most = max(most, len(driver.cache.sequences))

        params = SamplingParams(max_new_tokens=10)
        tight = generate(model, [[number] * 9 for number in range(2, 8)], params, driver=driver, cache_tokens=40, stream=watch)
    assert 1 <= most < 6
    assert [r.token_ids for r in tight] == [r.token_ids for r in generate(model, [[number] * 9 for number in range(2, 8)], params)]


def test_a_dropped_iterator_ends_the_work(model):
    stream = GenerationStream(model, PROMPTS, SamplingParams(max_new_tokens=50))
    next(stream)
    driver = stream._owned
    del stream
    assert driver.cache is None                                # closed
    with GenerationStream(model, PROMPTS, SamplingParams(max_new_tokens=50)) as stream:
        driver = stream._owned
    assert driver.cache is None and list(stream) == []


def test_a_first_interrupt_waits_for_the_step_and_a_second_does_not(model, monkeypatch):
    finished, forward = [], type(model).forward

    def interrupted(times):
        def run(self, step, cache):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            finished.append(forward(self, step, cache))
            return finished[-1]
        return run

    handler = signal.getsignal(signal.SIGINT)
    for times, steps in ((1, 1), (2, 0)):
        finished.clear()
        monkeypatch.setattr(type(model), "forward", interrupted(times))
        with pytest.raises(KeyboardInterrupt):
            generate(model, PROMPTS[:1], SamplingParams(max_new_tokens=5))
        assert len(finished) == steps
        assert signal.getsignal(signal.SIGINT) is handler


@pytest.fixture
def talk(folder, tokenizer):
    """Makes conversations on one open driver."""
    with Driver(load(folder, "kv_block_size=4")) as driver:
        yield lambda **options: Conversation(driver, tokenizer, SamplingParams(**{"max_new_tokens": 6} | options))


def say(conversation, text):
    return "".join(piece.text for piece in conversation.say(text))


def test_a_conversation_prefills_only_what_is_new(talk, model, tokenizer):
    conversation = talk()
    answers, prefilled = [], []
    for text in ("hi", "and you?", "ok"):
        answers.append(say(conversation, text))
        prefilled.append(conversation.prefilled)
    history = conversation.messages[:-1]
    ids = conversation._ids[: -6]
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(tokenizer.chat(history), add_special_tokens=False))
    assert sum(prefilled) <= len(ids) and max(prefilled[1:]) < 45               # nothing was run twice
    (fresh,) = generate(model, [ids], SamplingParams(max_new_tokens=6))         # the same tokens without a cache give the same answer
    assert fresh.text == answers[-1] == conversation.messages[-1]["content"]
    conversation.reset()
    assert say(conversation, "hi") == answers[0] and conversation.prefilled == prefilled[0]


def test_a_conversation_survives_broken_off_and_stopped_turns(talk):
    unbroken = talk()
    first, second = say(unbroken, "hi"), say(unbroken, "and you?")
    conversation = talk()
    pieces = conversation.say("hi")
    next(pieces)
    pieces.close()
    assert conversation.messages == []
    assert say(conversation, "hi") == first
    pieces = conversation.say("and you?")
    next(pieces)
    pieces.close()
    assert say(conversation, "and you?") == second
    stopped = talk(stop=first[2:4])
    assert say(stopped, "hi") == first[: first.index(first[2:4])]
    say(stopped, "go on")
    assert [message["role"] for message in stopped.messages] == ["user", "assistant"] * 2


def test_the_end_of_sequence_token_is_the_templates_to_write(folder, tokenizer):
    with Driver(load(folder)) as driver:
        params = SamplingParams(max_new_tokens=6)
        free = list(Conversation(driver, tokenizer, params).say("hi"))[-1].done
        driver.model.config = dataclasses.replace(driver.model.config, eos_ids=(free.token_ids[3],))
        conversation = Conversation(driver, tokenizer, params)
        done = list(conversation.say("hi"))[-1].done
        assert done.finish_reason == "eos" and done.token_ids == free.token_ids[:4]
        say(conversation, "go on")
        read = tokenizer.chat(conversation.messages[:-1])                # the second prompt: no end-of-sequence token beside the template's
        assert tokenizer.decode(conversation._ids).startswith(tokenizer.decode(tokenizer.encode(read, add_special_tokens=False)))
        assert conversation.prefilled < len(tokenizer.encode(read, add_special_tokens=False)) - 20


def test_a_conversation_that_outgrows_the_context_says_so_and_can_go_on(talk, model):
    conversation = talk()
    say(conversation, "hi")
    with pytest.raises(ModelError, match=f"the conversation .* longer than the model's context of {model.config.context_length}"):
        say(conversation, "x" * 200)
    assert len(conversation.messages) == 2
    assert say(conversation, "ok") is not None and len(conversation.messages) == 4
