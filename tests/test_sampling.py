"""Sampling equals transformers' processors filter by filter, and draws follow the exact distribution; wrong parameters are named."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_attn.models.sampling import LogitsError, SamplingParams, filtered, repetition_penalised, sample, sequence_generator

VOCAB = 50


def logits_of(seed, vocab=VOCAB):
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3


def warped(logits, history, **options):
    """What transformers' own generate would draw from: its processors, in its order, from its GenerationConfig."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **options})
    processors = model._get_logits_processor(config, input_ids_seq_length=len(history), device="cpu")
    return processors(torch.tensor([history]), logits[None])[0]


@pytest.mark.parametrize("options", [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
])
def test_filters_equal_transformers(options):
    params = SamplingParams(**{"temperature": 1.0, **options})
    history = [3, 3, 17, 4, 49, 0]
    for seed in range(5):
        logits = logits_of(seed)
        ours = filtered(repetition_penalised(logits, history, params.repetition_penalty), params)
        theirs = warped(logits, history, **options)
        assert torch.equal(torch.isinf(ours), torch.isinf(theirs))
        torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-6, atol=1e-7)
        assert not torch.equal(ours, logits) or options.get("top_k") == 1000         # the filter did something


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"repetition_penalty": 2.0}])
def test_draws_follow_the_distribution(options):
    params = SamplingParams(**{"temperature": 1.0, **options})
    logits, history, draws = logits_of(7, vocab=8) / 2, [1, 2], 4000
    exact = filtered(repetition_penalised(logits, history, params.repetition_penalty), params).double().softmax(-1)
    generator = sequence_generator(11, 0)
    counts = torch.zeros(8, dtype=torch.float64)
    for _ in range(draws):
        counts[sample(logits, params, history, generator)] += 1
    possible = exact > 0
    assert counts[~possible].sum() == 0
    expected = exact[possible] * draws
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum().item()
    degrees = int(possible.sum()) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * max(degrees, 1)) + 4             # about one in 10^4 under the right distribution
    if degrees:                                                                     # and the check can tell: a flat distribution fails it
        flat = torch.full_like(expected, draws / len(expected))
        assert ((counts[possible] - flat) ** 2 / flat).sum().item() > degrees + 4 * math.sqrt(2 * degrees) + 4


def test_greedy_is_the_argmax_and_uses_no_randomness():
    logits, generator = logits_of(3), sequence_generator(0, 0)
    before = generator.get_state()
    assert sample(logits, SamplingParams(), [], None) == int(logits.argmax())
    assert sample(logits, SamplingParams(temperature=0, top_p=0.1), [], generator) == int(logits.argmax())
    assert torch.equal(before, generator.get_state())
    penalised = sample(logits, SamplingParams(repetition_penalty=100.0), [int(logits.argmax())])
    assert penalised != int(logits.argmax())


def test_a_sequence_depends_on_seed_index_and_step_only():
    def tokens(seed, index, steps=20):
        generator = sequence_generator(seed, index)
        return [sample(logits_of(step), SamplingParams(temperature=1.5), [], generator) for step in range(steps)]

    assert tokens(5, 0) == tokens(5, 0)
    assert tokens(5, 0)[:10] == tokens(5, 0, steps=10)
    assert len({tuple(tokens(seed, index)) for seed in range(3) for index in range(3)}) == 9


def test_only_possible_tokens_are_drawn_at_the_edges():
    logits = torch.full((6,), -math.inf)
    logits[2] = 0.0
    generator = sequence_generator(1, 1)
    assert {sample(logits, SamplingParams(temperature=1.0), [], generator) for _ in range(50)} == {2}


@given(st.integers(0, 10**6), st.floats(0.05, 5.0), st.integers(0, 12), st.floats(0.01, 1.0), st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_a_filter_never_removes_the_best_token(seed, temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = logits_of(seed, vocab=10)
    kept = torch.isfinite(filtered(logits, params))
    assert kept[logits.argmax()]
    assert top_k == 0 or kept.sum() <= top_k
    assert kept[sample(logits, params, [], sequence_generator(seed, 0))]


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-37])
def test_a_temperature_near_nothing_draws_the_best_token(temperature):
    params = SamplingParams(temperature=temperature, top_k=3, top_p=0.9, min_p=0.1)
    assert sample(torch.tensor([1.0, 500.0, -3.0, 499.0]), params, [], sequence_generator(0, 0)) == 1


def test_unusable_logits_are_an_error():
    for bad in (math.nan, -math.inf):
        with pytest.raises(LogitsError, match="logits' maximum"):
            sample(torch.full((4,), bad), SamplingParams(), [])
    with pytest.raises(ValueError, match="needs a generator"):
        sample(logits_of(0), SamplingParams(temperature=1.0), [])


@pytest.mark.parametrize(("name", "value", "words"), [
    ("temperature", -0.1, "temperature is -0.1, expected a finite number of at least 0"),
    ("temperature", math.inf, "temperature is inf"),
    ("temperature", math.nan, "temperature is nan"),
    ("top_k", -1, "top_k is -1, expected a whole number of at least 0"),
    ("top_p", 0.0, "top_p is 0.0, expected above 0 and at most 1"),
    ("top_p", 1.1, "top_p is 1.1"),
    ("min_p", -0.5, "min_p is -0.5, expected from 0 to 1"),
    ("repetition_penalty", 0, "repetition_penalty is 0, expected a finite number above 0"),
    ("max_new_tokens", -1, "max_new_tokens is -1"),
    ("seed", 2**64, "seed is 18446744073709551616"),
    ("stop", ("a", ""), "stop is"),
])
def test_values_out_of_range_are_named(name, value, words):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**{name: value})
    assert words in str(caught.value)


def test_wrong_types_are_named():
    for name, value in (("top_k", 1.5), ("temperature", "hot"), ("max_new_tokens", True), ("seed", 0.5)):
        with pytest.raises(TypeError, match=f"{name} is"):
            SamplingParams(**{name: value})
    with pytest.raises(TypeError, match="do_sample is 'no', expected true or false"):
        SamplingParams.from_generation_config({"do_sample": "no"})
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)


def test_defaults_come_from_generation_config_and_flags_win():
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [1, 2]}
    params = SamplingParams.from_generation_config(config)
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.6, 0.9, 20, 1.05)
    params = SamplingParams.from_generation_config(config, temperature=0.0, top_k=0, seed=None)
    assert params.greedy and params.top_k == 0 and params.top_p == 0.9
    assert SamplingParams.from_generation_config({"temperature": 0.6, "top_k": None}).greedy          # do_sample is absent: greedy
    assert SamplingParams.from_generation_config({}, top_p=0.9).temperature == 1.0                      # a filter asks for sampling
    with pytest.raises(ValueError, match="top_p is 7"):
        SamplingParams.from_generation_config({"do_sample": True, "top_p": 7})
    with pytest.raises(TypeError, match="unknown sampling parameter 'topp'"):
        SamplingParams.from_generation_config({}, topp=0.5)
