"""Every family against transformers, one rank: unequal prompts, chunked prefill and decode in the same steps, fp32.

The tensor-parallel forms of the same comparison are in test_decoder_tp.py.
"""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is the definition these tests compare with")

from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, TOLERANCE, decode, difference, expect, make_model, save_family
from torch.overrides import TorchFunctionMode

from hetero_attn import registry
from hetero_attn.backend import Backend
from hetero_attn.communicator import SoloCommunicator
from hetero_attn.models.config import ModelConfig, ModelError
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.load import load_model
from hetero_attn.models.weights import Checkpoint
from hetero_attn.profile import load_profile

PROFILE = dataclasses.replace(load_profile("cpu"), kv_block_size=4, dtype="auto", vocabulary="sharded")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (folder, Expected), made on first use."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace(".", "-"))
            made[name] = folder, save_family(name, folder)
        return made[name]

    return make


def load(folder, **options):
    return load_model(folder, options.pop("profile", PROFILE), communicator=SoloCommunicator(), **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_transformers(saved, name):
    folder, expected = saved(name)
    decoder = load(folder)
    assert decoder.dtype == torch.float32 and decoder.config.path == folder
    continuations, logits = decode(decoder, expected.prompts)
    assert continuations == expected.continuations
    assert difference(logits, expected) <= TOLERANCE
    assert all(row.dtype == torch.float32 for row in logits)


# What each part of the config contributes must be visible to the comparison: leaving it out has to be caught.
CONTROLS = [
    ("llama3.1", "rotary", lambda value: dataclasses.replace(value, rope_type="default")),
    ("llama-biases-linear", "rotary", lambda value: dataclasses.replace(value, factor=2.0)),
    ("qwen2.5-yarn-window", "rotary", lambda value: dataclasses.replace(value, attention_factor=1.0)),
    ("qwen2.5-yarn-window", "windows", lambda value: (5, 5)),
    ("mistral", "windows", lambda value: (8, 8)),
    ("gemma2", "windows", lambda value: (6, 6, 6)),
    ("gemma2", "attention_softcap", lambda value: 0.0),
    ("gemma2", "logit_softcap", lambda value: 0.0),
    ("gemma2", "embedding_scale", lambda value: 1.0),
    ("gemma2", "norm_weight_offset", lambda value: 0),
    ("gemma2", "attention_scale", lambda value: 24**-0.5),
    ("gemma2", "activation", lambda value: "silu"),
    ("mixtral", "experts_per_token", lambda value: 3),
    ("llama2", "rms_norm_eps", lambda value: 0.1),
]


@pytest.mark.parametrize("name, field, change", CONTROLS, ids=[f"{name}-{field}" for name, field, _ in CONTROLS])
def test_a_seeded_fault_is_caught(saved, name, field, change):
    folder, expected = saved(name)
    config = ModelConfig.from_dir(folder)
    wrong = dataclasses.replace(config, **{field: change(getattr(config, field))})
    assert wrong != config
    decoder, checkpoint = Decoder(wrong, SoloCommunicator(), dtype=torch.float32, kv_block_size=4), Checkpoint(folder)
    checkpoint.load(decoder.shards(set(checkpoint.entries)))
    _, logits = decode(decoder, expected.prompts)
    assert difference(logits, expected) > 10 * TOLERANCE


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_block_size_and_chunks_change_nothing(saved, block_size):
    folder, expected = saved("mistral")
    decoder = load(folder, profile=dataclasses.replace(PROFILE, kv_block_size=block_size))
    for chunks in [(1,), (100,), (4, 9)]:
        continuations, logits = decode(decoder, expected.prompts, chunks=chunks)
        assert continuations == expected.continuations and difference(logits, expected) <= TOLERANCE


def test_master_vocabulary_of_one_rank(saved):
    folder, expected = saved("gemma2")
    continuations, logits = decode(load(folder, vocabulary="master"), expected.prompts)
    assert continuations == expected.continuations and difference(logits, expected) <= TOLERANCE


def test_last_only_gives_the_last_rows_and_any_rows_can_be_asked_for(saved):
    folder, expected = saved("qwen3")
    decoder = load(folder)
    cache = decoder.new_cache(64, 2)
    ids = [cache.add_sequence(), cache.add_sequence()]
    tokens = expected.prompts[1] + expected.prompts[3]
    step = cache.step(ids, [5, 14], tokens)
    logits = decoder(step, cache)
    assert logits.shape == (2, 131)
    for row, index, place in ((0, 1, 4), (1, 3, 13)):
        torch.testing.assert_close(logits[row], expected.logits[index][place], atol=TOLERANCE, rtol=0)
    none = dataclasses.replace(step, logits_at=step.logits_at[:0])
    assert decoder(none, cache).shape == (0, 131)


def test_a_head_of_its_own_is_used_whatever_the_config_says(tmp_path):
    """A fine-tuned head under a config.json that still says tied: transformers 5 uses the head, and so do we."""
    expected = save_family("llama3.2-tied", tmp_path, tie_word_embeddings=False)
    keys = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**keys, "tie_word_embeddings": True}))
    continuations, logits = decode(load(tmp_path), expected.prompts)
    assert continuations == expected.continuations and difference(logits, expected) <= TOLERANCE


def test_mixtral_with_fused_experts(saved, tmp_path):
    """The layout of transformers 5 in memory: all experts of a layer in one tensor, gate above up."""
    folder, expected = saved("mixtral")
    tensors, fused = load_file(folder / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            fused[name.replace("block_sparse_moe", "mlp")] = tensor
    for layer in range(2):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts."
        expert = [{w: tensors[f"{prefix}{e}.{w}.weight"] for w in ("w1", "w2", "w3")} for e in range(5)]
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack([torch.cat((e["w1"], e["w3"])) for e in expert])
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack([e["w2"] for e in expert])
    save_file(fused, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    continuations, logits = decode(load(tmp_path), expected.prompts)
    assert continuations == expected.continuations and difference(logits, expected) <= TOLERANCE


def test_hub_spelling_of_the_config(saved, tmp_path):
    """The same checkpoint under a config.json as transformers 4 wrote it."""
    folder, expected = saved("llama3.1")
    keys = json.loads((folder / "config.json").read_text())
    rope = keys.pop("rope_parameters")
    keys.update(rope_theta=rope.pop("rope_theta"), rope_scaling=rope, torch_dtype=keys.pop("dtype"))
    (tmp_path / "config.json").write_text(json.dumps(keys))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    continuations, logits = decode(load(tmp_path), expected.prompts)
    assert continuations == expected.continuations and difference(logits, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama3.1", "gemma2", "mixtral"])
def test_bfloat16_is_as_near_as_transformers_bfloat16(name, tmp_path):
    """Both round at many places; ours must not stand further from fp32 than twice what transformers' own bfloat16 does."""
    model = make_model(name)
    exact = expect(model, lengths=(23,), new_tokens=1)
    rounded = model.to(torch.bfloat16)
    theirs = difference(expect(rounded, lengths=(23,), new_tokens=1).logits, exact)
    rounded.save_pretrained(tmp_path)
    decoder = load(tmp_path)
    assert decoder.dtype == torch.bfloat16                                             # the checkpoint's, unless told
    cache = decoder.new_cache(64, 1)
    step = cache.step([cache.add_sequence()], [23], exact.prompts[0], last_only=False)
    ours = difference([decoder(step, cache)], exact)
    assert 1e-4 < ours <= 2 * theirs


def test_a_dtype_can_be_asked_for(saved):
    folder, _ = saved("qwen2")
    assert {p.dtype for p in load(folder, dtype="bfloat16").parameters()} == {torch.bfloat16}
    assert load(folder, dtype=torch.float16).new_cache(8, 1).k[0].dtype == torch.float16
    assert load(folder, profile=dataclasses.replace(PROFILE, dtype="bfloat16")).dtype == torch.bfloat16
    with pytest.raises(ModelError, match="dtype is int8, expected auto or one of float32, bfloat16, float16"):
        load(folder, dtype="int8")


def test_the_face_without_torchrun(saved, monkeypatch):
    """hetero_attn.load_model with nothing but a path: a detected profile and a communicator of its own."""
    import hetero_attn

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    folder, expected = saved("llama2")
    decoder = hetero_attn.load_model(folder, "cpu", tp=1)
    with decoder.communicator:
        continuations, _ = decode(decoder, expected.prompts)
    assert continuations == expected.continuations and decoder.profile.name == "cpu" and decoder.device.type == "cpu"
    with pytest.raises(ModelError, match="tp is 2, but 1 ranks are running; start the program with torchrun --nproc-per-node=2"):
        hetero_attn.load_model(folder, "cpu", tp=2)


def test_attention_goes_through_the_registry(saved):
    """A backend named around the call is the one that runs; an impossible name is refused from within the decoder."""
    from hetero_attn import registry
    from hetero_attn.backend import Backend, UnsupportedError

    class Refuses(Backend):
        name = "refuses"

        def unsupported_reasons(self, spec):
            return [f"page_size is {spec.page_size}"] if spec.varlen and spec.is_causal else []

    folder, expected = saved("llama2")
    decoder = load(folder)
    with registry.register("refuses", Refuses), registry.use_backend("refuses"), pytest.raises(UnsupportedError, match="page_size is 4"):
        decode(decoder, expected.prompts)
    with registry.use_backend("reference"):
        continuations, logits = decode(decoder, expected.prompts)
    assert continuations == expected.continuations and difference(logits, expected) <= TOLERANCE


def test_the_models_own_profile_chooses(saved):
    """Whatever profile is in force around the call: a strict one whose only backend is absent refuses, from inside the decoder."""
    from hetero_attn.backend import UnsupportedError
    from hetero_attn.registry import use_profile

    folder, expected = saved("llama2")
    other = dataclasses.replace(PROFILE, name="other", backends=("absent",), strict=True)
    with pytest.raises(UnsupportedError, match="'other'"):
        decode(load(folder, profile=other), expected.prompts)
    with use_profile(other):
        continuations, _ = decode(load(folder), expected.prompts)
    assert continuations == expected.continuations


def test_requests_that_make_no_sense(saved):
    folder, _ = saved("llama2")
    with pytest.raises(ModelError, match="tp is 3, but 1 ranks are running"):
        load(folder, tp=3)
    with pytest.raises(ModelError, match="vocabulary is 'everywhere', expected one of sharded, master"):
        load(folder, vocabulary="everywhere")
    decoder = load(folder)
    cache = decoder.new_cache(200, 1)
    sequence = cache.add_sequence()
    with pytest.raises(ModelError, match="65 tokens is longer than the model's context of 64 tokens"):
        cache.step([sequence], [65], [3] * 65)
    with pytest.raises(ValueError, match="token ids from 3 to 131, the vocabulary has 0 to 130"):
        decoder(cache.step([sequence], [2], [3, 131]), cache)
    with pytest.raises(ValueError, match="needs this step's token ids"):
        decoder(cache.step([sequence], [1]), cache)


class Products(TorchFunctionMode):
    """Counts the matrix products that a linear may be made of."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.nn.functional.linear, torch.mm, torch.addmm)
        return func(*args, **(kwargs or {}))


class OwnLinear(Backend):
    """A backend that serves products alone."""

    name, calls = "ownlinear", 0

    def unsupported_reasons(self, spec):
        return ["attention is not its business"]

    def linear(self, x, weight, bias=None, out=None):
        self.calls += 1
        return super().linear(x, weight, bias, out)


@pytest.mark.parametrize("name", ["llama2", "mixtral"])
def test_every_product_goes_through_the_backend_s_linear(saved, name):
    folder, expected = saved(name)
    backend = OwnLinear()
    with registry.register("ownlinear", lambda: backend):
        decoder = load_model(folder, dataclasses.replace(PROFILE, backends=("ownlinear", "sdpa")))
        with Products() as products:
            continuations, _ = decode(decoder, expected.prompts)
    assert continuations == expected.continuations
    assert backend.calls == products.count > 0
