"""What a decoder is, read from config.json: one frozen dataclass, and one table of the families.

Families differ in data (biases, norms, windows, softcaps), never in code paths of their own: the layers read these fields and nothing
else. A key of config.json that would change the mathematics and is not understood is refused by name. Both spellings are read, the
hub's (rope_theta, rope_scaling, torch_dtype) and that of transformers 5 (rope_parameters, dtype).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hetero_attn.models.rope import RotaryConfig


class ModelError(ValueError):
    """A model directory or request that cannot be served; the message is one line that says what to do."""


@dataclass(frozen=True)
class Family:
    """How one architecture of the hub departs from plain Llama. `defaults` are the values config.json leaves out."""

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | None = None               # None: config.json's attention_bias decides
    o_bias: bool | None = None                 # None: attention_bias decides
    mlp_bias: bool | None = False
    qk_norm: bool = False                      # RMS norm of every q and k head before the rotation
    gemma: bool = False                        # (1 + w) norms, post norms, scaled embedding, softcaps, query_pre_attn_scalar
    windows: str = "none"                      # which layers slide: none | all | late (from max_window_layers) | alternate
    experts: bool = False


_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES: dict[str, Family] = {                # by model_type; Yi is published as llama, Mistral-NeMo as mistral, Qwen2.5 as qwen2
    "llama": Family("LlamaForCausalLM", mlp_bias=None),
    "mistral": Family("MistralForCausalLM", {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
                      qkv_bias=False, o_bias=False, windows="all"),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, qkv_bias=True, o_bias=False, windows="late"),
    "qwen3": Family("Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, qk_norm=True, windows="late"),
    "gemma2": Family("Gemma2ForCausalLM", {
        "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192, "sliding_window": 4096, "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "eos_token_id": 1, "bos_token_id": 2,
    }, gemma=True, windows="alternate"),
    "mixtral": Family("MixtralForCausalLM", {
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    }, qkv_bias=False, o_bias=False, windows="all", experts=True),
}
LAYERS_LIMIT = 10_000                          # far above any model: a garbled number is refused instead of filling the memory
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes and variations. Sizes are whole-model, not one rank's."""

    path: Path
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float
    activation: str
    rotary: RotaryConfig
    windows: tuple[int | None, ...]            # a layer: None sees everything, W sees the W newest keys, itself included
    attention_scale: float
    attention_softcap: float = 0.0             # 0.0 is off
    logit_softcap: float = 0.0
    norm_weight_offset: int = 0                # 1: norms multiply by (1 + weight)
    post_norms: bool = False                   # a norm after attention and after the MLP, before the residual add
    embedding_scale: float = 1.0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    experts: int = 0                           # 0: a dense MLP
    experts_per_token: int = 0
    dtype: torch.dtype | None = None           # as config.json says; None: as the weights are
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Reads config.json (and the token ids of generation_config.json, which win). Raises ModelError."""
        path = Path(path)
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise ModelError(f"model directory {path} {what}; expected a folder with config.json and *.safetensors")
        keys = read_json(path / "config.json")
        generation = read_json(path / "generation_config.json", optional=True)
        return cls.from_keys(keys, generation, path)

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any], generation: Mapping[str, Any] | None = None, path: str | Path = ".") -> ModelConfig:
        """The same from config.json's content, already parsed."""
        model_type, family = _family(keys)
        _refuse(keys)
        read = _Keys({**family.defaults, **{key: value for key, value in keys.items() if value is not None or key == "sliding_window"
                                            or key.endswith("softcapping")}})
        generation = generation or {}
        hidden, q_heads = read.size("hidden_size"), read.size("num_attention_heads")
        layers = read.size("num_hidden_layers", most=LAYERS_LIMIT)
        kv_heads = read.size("num_key_value_heads", q_heads)
        if q_heads % kv_heads:
            raise ModelError(f"config.json: num_attention_heads {q_heads} is not a multiple of num_key_value_heads {kv_heads}")
        head_dim = read.size("head_dim", hidden // q_heads)
        activation = read.get("hidden_activation") or read.get("hidden_act", "silu")
        if activation not in ACTIVATIONS:
            raise ModelError(f"config.json: activation {activation!r} is not built; known: {', '.join(ACTIVATIONS)}")
        context_length = read.size("max_position_embeddings", 2048)
        attention_bias = read.flag("attention_bias")
        gemma = family.gemma
        config = cls(
            path=Path(path),
            model_type=model_type,
            vocab_size=read.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.size("intermediate_size"),
            layers=layers,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            context_length=context_length,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            activation=activation,
            rotary=_rotary(read, head_dim, context_length),
            windows=_windows(read, family, layers),
            attention_scale=(read.number("query_pre_attn_scalar", zero=False) if gemma else head_dim) ** -0.5,
            attention_softcap=read.number("attn_logit_softcapping", 0.0) if gemma else 0.0,
            logit_softcap=read.number("final_logit_softcapping", 0.0) if gemma else 0.0,
            norm_weight_offset=1 if gemma else 0,
            post_norms=gemma,
            embedding_scale=hidden**0.5 if gemma else 1.0,
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias if family.o_bias is None else family.o_bias,
            mlp_bias=read.flag("mlp_bias") if family.mlp_bias is None else family.mlp_bias,
            qk_norm=family.qk_norm,
            tied_embeddings=read.flag("tie_word_embeddings"),
            experts=read.size("num_local_experts") if family.experts else 0,
            experts_per_token=read.size("num_experts_per_tok") if family.experts else 0,
            dtype=_dtype(read),
            eos_ids=_token_ids(generation.get("eos_token_id", read.get("eos_token_id"))),
            bos_id=next(iter(_token_ids(generation.get("bos_token_id", read.get("bos_token_id")))), None),
            pad_id=next(iter(_token_ids(generation.get("pad_token_id", read.get("pad_token_id")))), None),
        )
        if config.experts_per_token > config.experts:
            raise ModelError(f"config.json: num_experts_per_tok {config.experts_per_token} exceeds num_local_experts {config.experts}")
        return config


class _Keys(dict):
    """config.json's keys, read with a check of the value."""

    def size(self, key: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ModelError(f"config.json: {key} is {value!r}, expected {'a positive integer' if least else 'an integer, not negative'}")
        if value > most:
            raise ModelError(f"config.json: {key} is {value}, expected at most {most}")
        return value

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):                            # the text "false" must not switch something on
            raise ModelError(f"config.json: {key} is {value!r}, expected true or false")
        return value

    def number(self, key: str, default: float | None = None, *, zero: bool = True) -> float:
        value = self.get(key, default)
        if value is None and key.endswith("softcapping"):          # an explicit null switches a softcap off
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf or not (value or zero):
            raise ModelError(f"config.json: {key} is {value!r}, expected a finite number, {'not negative' if zero else 'positive'}")
        return float(value)


def read_json(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a file of a model's directory; {} for an `optional` one that is not there. Raises ModelError for all else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if optional:
            return {}
        raise ModelError(f"{file} does not exist; expected a Hugging Face model directory with config.json") from None
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds {type(content).__name__}, expected a JSON object")
    return content


def _family(keys: Mapping[str, Any]) -> tuple[str, Family]:
    architectures, model_type = keys.get("architectures") or [], keys.get("model_type")
    if not isinstance(architectures, list):
        raise ModelError(f"config.json: architectures is {architectures!r}, expected a list of names")
    for known, family in FAMILIES.items():
        if family.architecture in architectures or (not architectures and known == model_type):
            return known, family
    asked = ", ".join(map(str, architectures)) or f"of model_type {model_type!r}"
    raise ModelError(f"unknown architecture {asked}; known: {', '.join(family.architecture for family in FAMILIES.values())}")


def _refuse(keys: Mapping[str, Any]) -> None:
    quantization = keys.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise ModelError(f"config.json: quantization_config ({method}) is not supported; use a float32, float16 or bfloat16 checkpoint")
    for key in ("use_bidirectional_attention", "use_mrope"):
        if keys.get(key):
            raise ModelError(f"config.json: {key} is {keys[key]!r}, which this decoder does not have")


def _rotary(read: _Keys, head_dim: int, context_length: int) -> RotaryConfig:
    parameters = {"rope_theta": read.get("rope_theta", 10000.0)}
    for key in ("rope_scaling", "rope_parameters"):               # the hub's spelling, then that of transformers 5
        if not isinstance(read.get(key, {}), dict):
            raise ModelError(f"config.json: {key} is {read[key]!r}, expected an object with rope_type")
        parameters.update({name: value for name, value in read.get(key, {}).items() if value is not None})
    if "partial_rotary_factor" in read:
        parameters.setdefault("partial_rotary_factor", read["partial_rotary_factor"])
    try:
        return RotaryConfig.from_parameters(parameters, head_dim=head_dim, context_length=context_length)
    except ValueError as error:
        raise ModelError(f"config.json: {error}") from None


def _windows(read: _Keys, family: Family, layers: int) -> tuple[int | None, ...]:
    """Per layer: None or the window's width, as the family and use_sliding_window / max_window_layers / layer_types say."""
    off = family.windows == "none" or (family.windows == "late" and not read.flag("use_sliding_window"))
    width = None if off or read.get("sliding_window") is None else read.size("sliding_window")
    kinds = read.get("layer_types")
    if not isinstance(kinds, list | None):
        raise ModelError(f"config.json: layer_types is {kinds!r}, expected a list of {layers} names")
    if width is None and family.windows != "none" and kinds and "sliding_attention" in kinds:
        raise ModelError("config.json: layer_types has sliding_attention, but sliding_window is off; set sliding_window to a width")
    if width is None:
        return (None,) * layers
    if kinds is None:
        first = read.size("max_window_layers", layers, least=0) if family.windows == "late" else 0
        slides = [i % 2 == 0 if family.windows == "alternate" else i >= first for i in range(layers)]
        return tuple(width if slide else None for slide in slides)
    if len(kinds) != layers or any(kind not in ("sliding_attention", "full_attention") for kind in kinds):
        raise ModelError(f"config.json: layer_types is {kinds!r}, expected {layers} times sliding_attention or full_attention")
    if family.windows == "all" and "full_attention" in kinds:
        raise ModelError(f"config.json: {family.architecture} slides in all layers or none, layer_types mixes them")
    return tuple(width if kind == "sliding_attention" else None for kind in kinds)


def _dtype(read: _Keys) -> torch.dtype | None:
    name = read.get("dtype") or read.get("torch_dtype")
    if name in (None, "auto"):
        return None
    if not isinstance(name, str) or name not in DTYPES:
        raise ModelError(f"config.json: dtype {name!r} is not supported; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _token_ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in values):
        raise ModelError(f"token ids are {value!r}, expected an integer or a list of integers")
    return tuple(values)
