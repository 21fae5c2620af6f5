"""A random decoder of Llama's shape, and the same without communication: what the schedules are compared on.

Only time is asked for, so weights are random and there is no checkpoint. Without communication (TokenWeave's "no comm") every collective
returns at once; each rank then norms all rows, as it would have to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hetero_attn.communicator import Communicator, add_and_norm
from hetero_attn.models.config import ModelConfig
from hetero_attn.models.decoder import Decoder
from hetero_attn.registry import linear_backend
from hetero_attn.testing.random_weights import randomised


@dataclass(frozen=True)
class Shape:
    """The model's sizes. ffn 0 leaves Llama's 2.75 times hidden, rounded up to 256. experts 0: a dense MLP."""

    hidden: int = 2048
    layers: int = 8
    ffn: int = 5632
    q_heads: int = 16
    kv_heads: int = 16
    vocab: int = 512
    experts: int = 0
    dtype: str = "float32"

    def config(self) -> ModelConfig:
        keys = {
            "architectures": ["MixtralForCausalLM" if self.experts else "LlamaForCausalLM"], "vocab_size": self.vocab,
            "hidden_size": self.hidden, "intermediate_size": self.ffn, "num_hidden_layers": self.layers,
            "num_attention_heads": self.q_heads, "num_key_value_heads": self.kv_heads, "max_position_embeddings": 1 << 17,
            "rms_norm_eps": 1e-5, "hidden_act": "silu",
        }
        if self.experts:
            keys |= {"num_local_experts": self.experts, "num_experts_per_tok": 2}
        return ModelConfig.from_keys(keys)


def random_decoder(shape: Shape, communicator: Communicator, profile) -> Decoder:
    """This rank's part, weights scaled so that the residual stream stays near 1. All layers share one layer's memory where that is large:
    the caches hold no layer's weights until the next step either way."""
    decoder = Decoder(shape.config(), communicator, dtype=getattr(torch, shape.dtype), kv_block_size=profile.kv_block_size, profile=profile)
    decoder.use_backend(linear_backend(profile))
    return randomised(decoder)


class Silent(Communicator):
    """Communication removed: what is asked for is given at once, of the right shape and as if this rank were alone."""

    def all_reduce(self, x, *, site=""):
        return x

    def reduce_scatter(self, x, *, site=""):
        return x[self.rows(x.shape[0])].clone()

    def all_gather(self, x, dim=0, *, sizes=None, site=""):
        return torch.cat([x] * self.world_size, dim)

    def broadcast(self, x, src=0, *, site=""):
        return x

    def all_reduce_rms_norm(self, x, residual_shard, weight, eps, *, site, weight_offset=0.0, post_weight=None):
        return add_and_norm(x, torch.zeros_like(x), weight, eps, weight_offset, post_weight), residual_shard


@contextlib.contextmanager
def silenced(decoder: Decoder) -> Iterator[None]:
    """In the block the decoder's communication is removed."""
    kept = decoder.communicator
    silent = Silent(kept.rank, kept.world_size)
    silent.linear = kept.linear
    holders = [module for module in decoder.modules() if getattr(module, "communicator", None) is kept]
    for module in holders:
        module.communicator = silent
    try:
        yield
    finally:
        for module in holders:
            module.communicator = kept
