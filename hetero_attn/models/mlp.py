"""The gated MLP of one layer: this rank's columns of gate and up, the same rows of down, and the sum over ranks in down's forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from hetero_attn.communicator import Communicator
from hetero_attn.models.config import ModelConfig
from hetero_attn.parallel.linear import ColumnParallelLinear, RowParallelLinear
from hetero_attn.parallel.sharding import Partition, Shard


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function of a name in models.config.ACTIVATIONS."""
    return {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
    }[name]


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, layer: int, communicator: Communicator, partition: Partition, *, dtype, device):
        super().__init__()
        own, ffn = partition.ffn, config.intermediate_size
        self.site = f"layers.{layer}.down_proj"
        self.activation = activation(config.activation)
        self.gate_up_proj = ColumnParallelLinear(
            config.hidden_size, [("gate_proj", ffn, own), ("up_proj", ffn, own)], bias=config.mlp_bias, dtype=dtype, device=device
        )
        self.down_proj = RowParallelLinear(
            communicator, "down_proj", ffn, config.hidden_size, own,
            site=self.site, bias=config.mlp_bias, dtype=dtype, device=device,
        )

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C] -> this rank's activations [T, own columns], the input of down_proj."""
        gate, up = self.gate_up_proj(x)
        return self.activation(gate) * up

    def summand(self, y: torch.Tensor) -> torch.Tensor:
        """columns(x) -> this rank's summand [T, C]."""
        return self.down_proj.partial(y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C] -> [T, C], summed over the ranks."""
        return self.down_proj(self.columns(x))

    def shards(self, prefix: str, names: set[str]) -> Iterator[Shard]:
        yield from self.gate_up_proj.shards(f"{prefix}mlp.")
        yield from self.down_proj.shards(f"{prefix}mlp.")
