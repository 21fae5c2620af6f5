"""config.json in both spellings, the families' defaults, and a refusal by name for everything that is not built."""

import dataclasses
import json

import pytest
import torch

from hetero_attn.models.config import ModelConfig, ModelError

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 131, "hidden_size": 64, "intermediate_size": 100,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}
GEMMA2, MIXTRAL, QWEN2, MISTRAL = (
    {"model_type": name.lower(), "architectures": [f"{name}ForCausalLM"]} for name in ("Gemma2", "Mixtral", "Qwen2", "Mistral")
)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def read(**changes):
    return ModelConfig.from_keys({**LLAMA, **changes})


def of(model_type, architecture, **changes):
    return read(model_type=model_type, architectures=[architecture], **changes)


def test_the_hub_and_transformers_5_spell_the_same_model():
    hub = read(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3}, torch_dtype="bfloat16")
    older = read(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3}, torch_dtype="bfloat16")
    newer = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}, dtype="bfloat16", rope_scaling=None)
    assert hub == older == newer
    assert hub.dtype == torch.bfloat16 and hub.rotary.theta == 5e5 and hub.rotary.factor == 8.0 and hub.rotary.original_context == 16


def test_left_out_keys_take_the_familys_defaults():
    llama = read()
    assert (llama.rotary.theta, llama.rms_norm_eps, llama.tied_embeddings) == (1e4, 1e-6, False)
    assert (llama.windows, llama.head_dim) == ((None, None), 16)
    gemma = of("gemma2", "Gemma2ForCausalLM")
    assert gemma.tied_embeddings and gemma.head_dim == 256 and gemma.activation == "gelu_pytorch_tanh"
    assert (gemma.attention_softcap, gemma.logit_softcap, gemma.attention_scale, gemma.embedding_scale) == (50.0, 30.0, 1 / 16, 8.0)
    assert gemma.windows == (4096, None) and gemma.norm_weight_offset == 1 and gemma.post_norms
    mixtral = of("mixtral", "MixtralForCausalLM")
    assert (mixtral.rotary.theta, mixtral.experts, mixtral.experts_per_token, mixtral.windows) == (1e6, 8, 2, (None, None))
    assert of("qwen3", "Qwen3ForCausalLM").head_dim == 128 and of("qwen3", "Qwen3ForCausalLM").qk_norm
    assert read(num_key_value_heads=None).kv_heads == 4


@pytest.mark.parametrize(
    "changes, windows",
    [
        ({}, (None,) * 4),
        ({"use_sliding_window": True, "sliding_window": 9}, (None,) * 4),                       # max_window_layers 28 of 4
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, (None, None, None, 9)),
        ({"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0}, (None,) * 4),
        ({"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2}, (9, None, 9, None)),
    ],
)
def test_windows_of_qwen2(changes, windows):
    assert of("qwen2", "Qwen2ForCausalLM", num_hidden_layers=4, **changes).windows == windows


def test_windows_of_mistral():
    assert of("mistral", "MistralForCausalLM").windows == (4096, 4096)                          # transformers' default when left out
    assert of("mistral", "MistralForCausalLM", sliding_window=None).windows == (None, None)     # an explicit null is no window
    assert of("mistral", "MistralForCausalLM", sliding_window=8).windows == (8, 8)


def test_an_explicit_null_switches_a_softcap_off():
    gemma = of("gemma2", "Gemma2ForCausalLM", attn_logit_softcapping=None, final_logit_softcapping=20.0)
    assert (gemma.attention_softcap, gemma.logit_softcap) == (0.0, 20.0)


def test_biases():
    assert not read().qkv_bias and not read().mlp_bias
    biased = read(attention_bias=True, mlp_bias=True)
    assert biased.qkv_bias and biased.o_bias and biased.mlp_bias
    qwen2 = of("qwen2", "Qwen2ForCausalLM", attention_bias=False)
    assert qwen2.qkv_bias and not qwen2.o_bias


def test_generation_config_wins_for_token_ids(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 2, "bos_token_id": 1}))
    assert ModelConfig.from_dir(tmp_path).eos_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    config = ModelConfig.from_dir(tmp_path)
    assert (config.eos_ids, config.bos_id, config.pad_id, config.path) == ((5, 7), 1, None, tmp_path)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().layers = 3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["BertModel"]}, "unknown architecture BertModel; known: LlamaForCausalLM, .*MixtralForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "unknown architecture of model_type 'gpt2'; known: Llama"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantization_config \(gptq\) is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling type 'dynamic' is not built; known: default, linear, llama3"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope' is not built"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "original_max_position_embeddings is None"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale in a yarn"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"head_dim": 15}, "head_dim is 15, the rotation needs an even number"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"hidden_act": "swish2"}, "activation 'swish2' is not built; known: silu"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported; expected one of float32"),
        ({"eos_token_id": "</s>"}, "token ids are '</s>'"),
        ({**GEMMA2, "use_bidirectional_attention": True}, "use_bidirectional"),
        ({**MIXTRAL, "num_experts_per_tok": 9}, "9 exceeds num_local_experts 8"),
        ({**QWEN2, "use_sliding_window": True, "layer_types": ["full"]}, "layer_types"),
        ({**MISTRAL, "layer_types": ["full_attention", "sliding_attention"]}, "mixes"),
        ({**MISTRAL, "layer_types": 2}, "layer_types is 2, expected a list of 2 names"),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers is '1', expected an integer, not negative"),
        ({**GEMMA2, "query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, expected a finite number, positive"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a finite number"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}}, "beta_fast is -1 in the rope parameters"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most 10000"),
        ({"architectures": 5}, "architectures is 5, expected a list of names"),
        ({"torch_dtype": ["bfloat16"]}, "dtype .'bfloat16'. is not supported"),
    ],
)
def test_refusals_are_one_line_and_name_the_key(changes, message):
    with pytest.raises(ModelError, match=message) as caught:
        read(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [(None, "config.json does not exist; expected a Hugging Face model directory"), ("{", "cannot be read as JSON"),
     ("[" * 200_000, "cannot be read as JSON"), ("1" * 5000, "cannot be read as JSON"), ("[]", "holds list")],
)
def test_config_files_that_cannot_be_read(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_dir(tmp_path)


def test_missing_directory(tmp_path):
    with pytest.raises(ModelError, match=r"model directory .*nowhere does not exist"):
        ModelConfig.from_dir(tmp_path / "nowhere")
