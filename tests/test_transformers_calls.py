"""The two functions that the Hugging Face adapter registers, called as transformers calls them, against transformers' own sdpa."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.20")         # why 5.20: see test_transformers.py

from hf_models import make_model  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function  # noqa: E402

from hetero_attn.integrations import transformers as adapter  # noqa: E402
from hetero_attn.integrations import transformers_masks as masks  # noqa: E402


def random_attention(q_len, kv_len, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, length, 8, generator=generator) for heads, length in ((4, q_len), (2, kv_len), (2, kv_len))]


class Layer(torch.nn.Module):
    """What transformers' attention functions read of a module."""

    num_key_value_groups = 2

    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_packed_sequences_under_a_mask_that_does_not_separate_them(mask_dtype):
    q, k, v = (x[:1] for x in random_attention(12, 12))
    bounds = torch.tensor([0, 5, 6, 12])
    mask = torch.ones(12, 12).tril().bool()[None, None]
    mask = mask if mask_dtype == torch.bool else torch.zeros(12, 12).masked_fill(~mask, -torch.inf)
    masked, _ = adapter.attention_forward(Layer(True), q, k, v, mask, cu_seq_lens_q=bounds)
    unmasked, _ = adapter.attention_forward(Layer(True), q, k, v, None, cu_seq_lens_q=bounds)
    torch.testing.assert_close(masked, unmasked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [
    {"q_length": 9, "kv_length": 9}, {"q_length": 1, "kv_length": 9, "q_offset": 8},
    {"q_length": 1, "kv_length": 9, "q_offset": 14, "kv_offset": 6},
], ids=str)
def test_masks_are_left_out_only_where_the_window_says_the_same(changes):
    """What transformers asks for a mistral with a window of 5: the mask spelled out is the window alone. Any change to that: a mask."""
    asked = {
        "batch_size": 2, "q_offset": 0, "kv_offset": 0, "mask_function": sliding_window_causal_mask_function(5), "local_size": 5,
        "config": make_model("mistral").config, "allow_is_causal_skip": True, "attention_mask": None,
    } | changes
    assert masks.make_mask(**asked) is None
    spelled_out = sdpa_mask(**asked | {"allow_is_causal_skip": False})
    back = torch.arange(asked["kv_length"] - asked["q_length"], asked["kv_length"])[:, None] - torch.arange(asked["kv_length"])
    assert torch.equal(spelled_out, ((back >= 0) & (back < 5)).expand_as(spelled_out))
    padded = torch.ones(2, asked["kv_offset"] + 9, dtype=torch.bool)
    assert masks.make_mask(**asked | {"attention_mask": padded}) is None
    padded[1, -5] = False
    for change in (
        {"attention_mask": padded}, {"allow_is_causal_skip": False}, {"kv_length": 11}, {"q_offset": 3},
        {"config": make_model("qwen2_moe").config},
        {"attention_mask": padded[:1, :-2].expand(2, -1)}, {"local_size": 4, "mask_function": sliding_window_causal_mask_function(4)},
    ):
        given = asked | change
        assert torch.equal(masks.make_mask(**given), sdpa_mask(**given | {"allow_is_causal_skip": False})), change


@pytest.mark.parametrize("mask_kind", ["none", "bool", "float"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "position_bias"])
@pytest.mark.parametrize("lengths", [(6, 6), (4, 9), (9, 4), (1, 7), (7, 1)], ids=str)
def test_causality_and_masks_mean_what_they_mean_to_sdpa(lengths, biased, mask_kind):
    """The oracle is transformers' sdpa function, called with the same arguments."""
    generator = torch.Generator().manual_seed(2)
    shape = (2, 1, *lengths)
    seen = torch.rand(shape, generator=generator) < 0.6
    seen[..., 0] = True                                 # no row without a key
    mask = {"none": None, "bool": seen, "float": torch.randn(shape, generator=generator)}[mask_kind]
    options = {"scaling": 0.3}
    if biased:
        options["position_bias"] = torch.randn(1, 4, *lengths, generator=generator)
    for of_module in (True, False):
        for keyword in (None, True, False):
            arguments = (Layer(of_module), *random_attention(*lengths), mask)
            ours, weights = adapter.attention_forward(*arguments, is_causal=keyword, **options)
            theirs, _ = sdpa_attention_forward(*arguments, is_causal=keyword, **options)
            assert weights is None and ours.is_contiguous() and ours.shape == (2, lengths[0], 4, 8)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(9, 9), (5, 5), (1, 9), (1, 5), (9, 6)], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_window_without_a_mask(lengths, is_causal):
    """W counts the token itself; an encoder looks as far ahead. One query stands at the last key."""
    q_len, kv_len = lengths
    q, k, v = random_attention(q_len, kv_len)
    position = torch.arange(q_len)[:, None] + (kv_len - 1 if q_len == 1 else 0)
    ahead = torch.arange(kv_len) - position
    seen = ((ahead > -4) & (ahead <= 0)) if is_causal else (ahead.abs() < 4)
    ours, _ = adapter.attention_forward(Layer(is_causal), q, k, v, None, sliding_window=4)
    spelled_out, _ = adapter.attention_forward(Layer(is_causal), q, k, v, seen[None, None], sliding_window=4)
    torch.testing.assert_close(ours, spelled_out, atol=1e-5, rtol=1e-5)
    unwindowed, _ = adapter.attention_forward(Layer(is_causal), q, k, v, None)
    assert not torch.allclose(ours, unwindowed, atol=1e-2)


def test_a_layer_that_does_not_say_whether_it_is_causal():
    """sdpa takes it for causal; in a model that was not made for sdpa it is not."""
    silent = Layer(True)
    del silent.is_causal
    splinter = make_model("splinter").encoder.layer[0].attention.self
    assert not hasattr(splinter, "is_causal")
    arguments = (*random_attention(6, 6), None)
    causal, _ = adapter.attention_forward(Layer(True), *arguments)
    assert torch.equal(adapter.attention_forward(silent, *arguments)[0], causal)
    bidirectional, _ = adapter.attention_forward(Layer(False), *arguments)
    assert torch.equal(adapter.attention_forward(splinter, *arguments)[0], bidirectional)


def test_batch_of_one_is_broadcast():
    """Learned queries come with a batch of 1."""
    q, k, v = random_attention(3, 5)
    ours, _ = adapter.attention_forward(Layer(False), q[:1], k, v, None)
    theirs, _ = adapter.attention_forward(Layer(False), q[:1].expand(2, -1, -1, -1), k, v, None)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("options", "error", "text"), [
    ({"dropout": 0.1}, ValueError, "dropout=0.1"),
    ({"output_attentions": True}, ValueError, "eager"),
    ({"indices": torch.zeros(1)}, TypeError, "argument indices"),
    ({"cache": object(), "block_table": torch.zeros(1)}, TypeError, "arguments block_table, cache"),
    ({"head_mask": torch.ones(4)}, TypeError, "head_mask"),
    ({"s_aux": torch.zeros(2, 4, 3, 1)}, ValueError, "sinks"),
    ({"cu_seq_lens_k": torch.tensor([0, 6])}, ValueError, "cu_seq_lens_q"),
    ({"cu_seq_lens_q": torch.tensor([0, 6, 12]), "position_bias": torch.zeros(1, 4, 6, 6)}, ValueError, "position_bias"),
])
def test_what_cannot_be_served_is_refused_by_name(options, error, text):
    with pytest.raises(error, match=text):
        adapter.attention_forward(Layer(True), *random_attention(6, 6), None, **options)


def test_harmless_arguments_and_absent_ones_pass():
    plain, _ = adapter.attention_forward(Layer(True), *random_attention(6, 6), None)
    extra = dict.fromkeys(adapter.HARMLESS, 1) | {"indices": None, "output_attentions": False}
    with_extra, _ = adapter.attention_forward(Layer(True), *random_attention(6, 6), None, **extra)
    assert torch.equal(plain, with_extra)


def test_autocast_has_one_dtype():
    """Rotary embeddings leave q and k in fp32 where v is bfloat16; torch's SDPA casts them all under autocast, so do we."""
    q, k, v = random_attention(6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, _ = adapter.attention_forward(Layer(True), q, k, v.bfloat16(), None)
        theirs, _ = sdpa_attention_forward(Layer(True), q, k, v.bfloat16(), None)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
    with pytest.raises(TypeError, match="bfloat16"):
        adapter.attention_forward(Layer(True), q, k, v.bfloat16(), None)


def test_code_that_cannot_be_read_gets_the_masks_of_eager():
    """A config from elsewhere, whose modeling code nobody can vouch for: nothing is left out."""
    unknown = type("UnknownConfig", (transformers.LlamaConfig,), {"__module__": "somewhere.configuration_unknown"})()
    asked = {"batch_size": 1, "q_length": 4, "kv_length": 4, "dtype": torch.float32, "config": unknown}
    mask = masks.make_mask(**asked)
    assert torch.equal(mask, torch.full((4, 4), torch.finfo(torch.float32).min).triu(1)[None, None])
    assert masks.make_mask(**asked | {"config": make_model("llama").config}) is None
