"""Mixture of experts, tensor parallel inside the experts: every rank has its columns of all of them, and the whole router.

So ranks agree on the routing without talking, do the same share of work whatever the tokens choose, and sum once a layer. Both layouts
of the hub are read: a tensor an expert (block_sparse_moe.experts.N.w1), and all experts fused (mlp.experts.gate_up_proj).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from hetero_attn.communicator import Communicator
from hetero_attn.models.config import ModelConfig
from hetero_attn.models.mlp import activation
from hetero_attn.parallel.linear import empty_parameter, product
from hetero_attn.parallel.sharding import Partition, Shard
from hetero_attn.product import linear


class MixtureOfExperts(nn.Module):
    """A token's experts_per_token best experts, weighted by their softmax probabilities scaled to a sum of 1."""

    linear = staticmethod(linear)
    streamed = None                              # lends (gate_up, down), where they are not held (parallel/window.py)

    def __init__(self, config: ModelConfig, layer: int, communicator: Communicator, partition: Partition, *, dtype, device):
        super().__init__()
        self.communicator, self.site = communicator, f"layers.{layer}.down_proj"
        self.experts, self.experts_per_token = config.experts, config.experts_per_token
        self.ffn, self.own, hidden = config.intermediate_size, partition.ffn, config.hidden_size
        self.activation = activation(config.activation)
        self.router = empty_parameter(self.experts, hidden, dtype=dtype, device=device)                      # [E, C]
        self.gate_up = empty_parameter(self.experts, 2 * len(self.own), hidden, dtype=dtype, device=device)  # [E, 2 own, C]
        self.down = empty_parameter(self.experts, hidden, len(self.own), dtype=dtype, device=device)         # [E, C, own]

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, C] -> weights [T, k] fp32 and experts [T, k] int64."""
        probabilities = self.linear(x, self.router).float().softmax(dim=-1)
        weights, experts = probabilities.topk(self.experts_per_token, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True), experts

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C], as it is: all of an expert's work is in summand(), for a token's way through it is its own."""
        return x

    def summand(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C] -> this rank's summand [T, C]."""
        weights, experts = self.route(x)
        if self.streamed is None:
            return self.mixed(x, weights, experts, self.gate_up, self.down)
        with self.streamed as (gate_up, down):
            return self.mixed(x, weights, experts, gate_up, down)

    def mixed(
        self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        """x [T, C], weights and experts [T, k], gate_up [E, 2 own, C], down [E, C, own] -> [T, C]."""
        out = self.communicator.empty(x.shape, x.dtype).zero_()
        for expert in experts.unique().tolist():
            rows, place = (experts == expert).nonzero(as_tuple=True)
            gate, up = product(self.linear, x[rows], gate_up[expert]).chunk(2, dim=-1)
            y = product(self.linear, self.activation(gate) * up, down[expert])
            out.index_add_(0, rows, (y * weights[rows, place, None]).to(x.dtype))
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C] -> [T, C], summed over the ranks."""
        return self.communicator.all_reduce(self.summand(x), site=self.site)

    def shards(self, prefix: str, names: set[str]) -> Iterator[Shard]:
        hidden, own, count = self.router.shape[1], self.own, len(self.own)
        block = f"{prefix}block_sparse_moe." if f"{prefix}block_sparse_moe.gate.weight" in names else f"{prefix}mlp."
        yield Shard(f"{block}gate.weight", (self.experts, hidden), (), self.router)
        gate, up = self.gate_up.split(count, dim=1) if count else (self.gate_up, self.gate_up)
        if f"{block}experts.gate_up_proj" in names:
            every, shape = range(self.experts), (self.experts, 2 * self.ffn, hidden)
            yield Shard(f"{block}experts.gate_up_proj", shape, (every, own), gate)
            yield Shard(f"{block}experts.gate_up_proj", shape, (every, range(self.ffn + own.start, self.ffn + own.stop)), up)
            yield Shard(f"{block}experts.down_proj", (self.experts, hidden, self.ffn), (every, range(hidden), own), self.down)
            return
        for expert in range(self.experts):
            yield Shard(f"{block}experts.{expert}.w1.weight", (self.ffn, hidden), (own,), gate[expert])
            yield Shard(f"{block}experts.{expert}.w3.weight", (self.ffn, hidden), (own,), up[expert])
            yield Shard(f"{block}experts.{expert}.w2.weight", (hidden, self.ffn), (range(hidden), own), self.down[expert])
