"""The Hugging Face adapter: every kind of attention against transformers' own eager, and every call against what was meant to reach us.

Equal logits alone would also come from a model that never called us, so a spy on hetero_attn.attention counts and shows the calls.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

# The adapter serves 4.56 too, but there encoders, T5 and Qwen2-MoE bypass the interface, and sdpa, the oracle, reads is_causal otherwise.
transformers = pytest.importorskip("transformers", minversion="5.20")

from hf_models import DECODERS, ENCODERS, LENGTH, SEQ2SEQ, TOLERANCE, VOCAB, make_batch, make_model  # noqa: E402

import hetero_attn  # noqa: E402
from hetero_attn import registry  # noqa: E402
from hetero_attn.integrations import transformers as adapter  # noqa: E402
from hetero_attn.integrations import transformers_masks as masks  # noqa: E402

transformers.logging.set_verbosity_error()
NAME = "hetero_attn"


@pytest.fixture(autouse=True, scope="module")
def registered():
    adapter.register()
    assert adapter.register() == NAME                   # a second time changes nothing
    yield
    adapter.unregister()


@pytest.fixture
def calls(monkeypatch):
    """What reached hetero_attn.attention, one dict a call; the calls themselves run."""
    seen = []

    def spy(q, k, v, **options):                        # q [B, Sq, H, D]
        seen.append({"q_len": q.shape[1], "kv_len": k.shape[1], **options})
        return hetero_attn.attention(q, k, v, **options)

    monkeypatch.setattr(adapter, "attention", spy)
    return seen


@torch.no_grad()
def logits(model, attn_implementation: str, **inputs) -> torch.Tensor:
    model.set_attn_implementation(attn_implementation)
    out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


@torch.no_grad()
def greedy(model, attn_implementation: str, batch, new_tokens: int = 8, **options) -> torch.Tensor:
    model.set_attn_implementation(attn_implementation)
    return model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, **options)


def assert_close(ours: torch.Tensor, eager: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Where the mask says token: what stands at padding is nobody's business, and eager's average there is not our zero."""
    error = (ours - eager).abs()
    assert (error if mask is None else error[mask.bool()]).max() < TOLERANCE * eager.abs().max()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("model_type", [*DECODERS, *ENCODERS])
def test_logits_equal_eager(model_type, padding, calls):
    model, batch = make_model(model_type), make_batch(padding)
    eager = logits(model, "eager", **batch)
    assert not calls
    assert_close(logits(model, NAME, **batch), eager, batch["attention_mask"])
    assert len(calls) == 2                              # one a layer


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("model_type", [*DECODERS, *SEQ2SEQ])
def test_greedy_tokens_equal_eager(model_type, cache, calls):
    """The prompts are padded, and longer than the windows; so is the generated part. The logits of every step are compared, too."""
    model, batch = make_model(model_type), make_batch("left")
    options = {"cache_implementation": cache, "return_dict_in_generate": True, "output_logits": True}
    eager = greedy(model, "eager", batch, **options)
    ours = greedy(model, NAME, batch, **options)
    assert torch.equal(ours.sequences, eager.sequences)
    assert_close(torch.stack(ours.logits), torch.stack(eager.logits))
    assert len(calls) >= 2 * 8


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("model_type", SEQ2SEQ)
def test_encoder_decoder(model_type, padding, calls):
    """Encoder, causal decoder and cross-attention (5 queries, 12 padded keys) in one model; T5 adds its position bias."""
    model, batch = make_model(model_type), make_batch(padding)
    batch["decoder_input_ids"] = make_batch("none")["input_ids"][:, :5]
    assert_close(logits(model, NAME, **batch), logits(model, "eager", **batch))
    encoder = [] if model_type == "bigbird_pegasus" else [(LENGTH, LENGTH)] * 2
    assert [(call["q_len"], call["kv_len"]) for call in calls] == [*encoder, (5, 5), (5, LENGTH), (5, 5), (5, LENGTH)]


def test_vision(calls):
    model = make_model("vit")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert_close(logits(model, NAME, pixel_values=pixels), logits(model, "eager", pixel_values=pixels))
    assert not any(call["is_causal"] for call in calls) and calls


def test_without_the_mask_interface_padded_batches_are_wrong(monkeypatch):
    """The negative control: only the first of the two registrations. The comparison above must notice, and does."""
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "half_registered", adapter.attention_forward)
    model = make_model("llama")
    assert_close(logits(model, "half_registered", **make_batch("none")), logits(model, "eager", **make_batch("none")))
    batch = make_batch("left")
    error = (logits(model, "half_registered", **batch) - logits(model, "eager", **batch)).abs()[batch["attention_mask"].bool()]
    assert error.max() > 0.05


@pytest.mark.parametrize("model_type", sorted(masks.WINDOW_BY_KEYWORD))
def test_listed_types_pass_their_window_to_the_kernel(model_type, calls):
    """For the listed types a whole batch has no mask at all, at prefill and at decode; with padding it has."""
    model, batch = make_model(model_type), make_batch("none")
    tokens = greedy(model, NAME, batch, new_tokens=3)
    assert all(call["attn_mask"] is None for call in calls)
    assert {(4, 0)} <= {call["window_size"] for call in calls if call["q_len"] == LENGTH}
    assert torch.equal(tokens, greedy(model, "eager", batch, new_tokens=3))
    calls.clear()
    logits(model, NAME, **make_batch("left"))
    assert all(call["attn_mask"] is not None and call["window_size"] == (-1, -1) for call in calls)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt_oss"])
def test_chunked_prefill(model_type, calls):
    """7 tokens, then 5 more on top of the cache: fewer queries than keys, and a mask that says which."""
    model, ids = make_model(model_type), make_batch("none")["input_ids"]
    whole = logits(model, "eager", input_ids=ids)
    model.set_attn_implementation(NAME)
    with torch.no_grad():
        first = model(ids[:, :7], use_cache=True)
        second = model(ids[:, 7:], past_key_values=first.past_key_values)
    assert_close(torch.cat([first.logits, second.logits], 1), whole)
    assert any(call["q_len"] == 5 < call["kv_len"] and call["attn_mask"] is not None for call in calls)


def test_assisted_decoding(calls):
    """Drafts from the prompt itself are verified several at a time; greedy tokens stay what they are."""
    model, batch = make_model("llama"), {"input_ids": torch.tensor([[5, 6, 7, 8] * 4])}
    plain = greedy(model, "eager", batch)
    assert torch.equal(greedy(model, NAME, batch, prompt_lookup_num_tokens=3), plain)
    assert any(1 < call["q_len"] < call["kv_len"] for call in calls)


def test_empty_static_cache_is_cut_to_the_prompt(calls):
    """No padding: transformers gives no mask and 32 keys for 12 queries, which for us would be bottom-right."""
    model, ids = make_model("llama"), make_batch("none")["input_ids"]
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    ours = logits(model, NAME, input_ids=ids, past_key_values=cache)
    assert [(call["q_len"], call["kv_len"], call["attn_mask"], call["is_causal"]) for call in calls] == [(12, 12, None, True)] * 2
    assert_close(ours, logits(model, "eager", input_ids=ids))


@pytest.mark.parametrize("route", ["positions", "positions and lengths", "lengths"])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_packed_sequences(model_type, route, calls, monkeypatch):
    """Sequences of 5, 1 and 6 tokens in one row, as padding-free training packs them, are what they are alone.

    transformers makes a mask of position_ids that start again, unless there is a cache: then cu_seq_lens alone has the boundaries.
    """
    packed = []
    monkeypatch.setattr(adapter, "attention_varlen", lambda *a, **o: packed.append(o) or hetero_attn.attention_varlen(*a, **o))
    model, ids, lengths = make_model(model_type), make_batch("none")["input_ids"][:1], (5, 1, 6)
    alone = torch.cat([logits(model, "eager", input_ids=part) for part in ids.split(lengths, dim=1)], dim=1)
    bounds = torch.tensor([0, 5, 6, 12])
    given = {} if route == "positions" else {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 6, "max_length_k": 6}
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    assert_close(logits(model, NAME, input_ids=ids, position_ids=positions, use_cache=route == "lengths", **given), alone)
    assert (len(packed), len(calls)) == ((2, 0) if route == "lengths" else (0, 2))


def test_training_with_dropout_is_refused_and_without_it_has_gradients():
    batch = make_batch("right")                         # a left-padded row's last pad predicts a token, and nobody defines its output
    model = make_model("llama", attention_dropout=0.1).train()
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="dropout"):
        model(**batch)
    gradients = {}
    for implementation in ("eager", NAME):
        model = make_model("llama").train()
        model.set_attn_implementation(implementation)
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        gradients[implementation] = model.model.layers[0].self_attn.q_proj.weight.grad
    assert gradients["eager"].abs().max() > 1e-3
    torch.testing.assert_close(gradients[NAME], gradients["eager"], atol=1e-5, rtol=1e-4)


def test_models_that_compute_attention_themselves_are_refused():
    """transformers would build bloom with any name, and bloom would add our boolean mask to its scores as ones and zeros."""
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    with pytest.raises(ValueError, match=r"'bloom' computes its attention itself.*use attn_implementation='eager'"):
        model(**make_batch("left"))


def test_every_way_to_choose_the_implementation(tmp_path, calls):
    model, batch = make_model("llama", NAME), make_batch("left")
    assert model.config._attn_implementation == NAME
    expected = logits(model, NAME, **batch)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME).eval()
    calls.clear()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, expected)
    assert len(calls) == 2


class Picky(hetero_attn.Backend):
    name = "picky"

    def unsupported_reasons(self, spec):
        return [f"softcap {spec.softcap:g} is not to its taste"]


def test_use_backend_reaches_the_model():
    model, batch = make_model("gemma2"), make_batch("left")
    eager = logits(model, "eager", **batch)
    with hetero_attn.use_backend("reference"):
        assert_close(logits(model, NAME, **batch), eager, batch["attention_mask"])
    with registry.register("picky", Picky), hetero_attn.use_backend("picky"):
        with pytest.raises(hetero_attn.UnsupportedError, match="softcap 2 is not to its taste"):
            logits(model, NAME, **batch)


def test_torch_compile_without_graph_breaks():
    model, ids = make_model("mistral"), make_batch("none")["input_ids"]
    eager = logits(model, "eager", input_ids=ids, use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    model.set_attn_implementation(NAME)
    with torch.no_grad():
        assert_close(compiled(input_ids=ids, use_cache=False).logits, eager)


def test_hetero_attn_alone_does_not_import_transformers():
    code = "import sys, hetero_attn, hetero_attn.integrations; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, timeout=120).returncode == 0
