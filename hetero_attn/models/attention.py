"""Self-attention of one layer, of this rank's heads: project, rotate, store in the pages, attend, project back.

Prefill, chunked prefill, decode and mixed batches are the same four lines: the cache puts every new token's K and V into the pages first,
then one paged, causal, bottom-right attention call reads them back together with the past, wherever a layer's pages lie.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from hetero_attn.communicator import Communicator
from hetero_attn.models.cache import PagedCache, Step
from hetero_attn.models.config import ModelConfig
from hetero_attn.models.norm import RMSNorm
from hetero_attn.models.rope import rotate
from hetero_attn.parallel.linear import ColumnParallelLinear, RowParallelLinear
from hetero_attn.parallel.sharding import Partition, Shard, features


class Attention(nn.Module):
    """Grouped-query attention over the paged cache; q_heads and kv_heads are this rank's."""

    def __init__(self, config: ModelConfig, layer: int, communicator: Communicator, partition: Partition, *, dtype, device):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q_heads, self.kv_heads = len(partition.q_heads), len(partition.kv_heads)
        self.scale, self.softcap = config.attention_scale, config.attention_softcap
        window = config.windows[layer]
        self.window_size = (-1, -1) if window is None else (window - 1, -1)          # a window of W keys counts the query's own
        q_own, kv_own = features(partition.q_heads, self.head_dim), features(partition.kv_heads, self.head_dim)
        q_features, kv_features = config.q_heads * self.head_dim, config.kv_heads * self.head_dim
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size,
            [("q_proj", q_features, q_own), ("k_proj", kv_features, kv_own), ("v_proj", kv_features, kv_own)],
            bias=config.qkv_bias, dtype=dtype, device=device,
        )
        self.o_proj = RowParallelLinear(
            communicator, "o_proj", q_features, config.hidden_size, q_own,
            site=f"layers.{layer}.o_proj", bias=config.o_bias, dtype=dtype, device=device,
        )
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm("q_norm", self.head_dim, config.rms_norm_eps, dtype=dtype, device=device)
            self.k_norm = RMSNorm("k_norm", self.head_dim, config.rms_norm_eps, dtype=dtype, device=device)

    def heads(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], step: Step, cache: PagedCache) -> torch.Tensor:
        """x [T, C] -> what this rank's query heads saw [T, q_heads * head_dim], the input of o_proj. Fills the cache."""
        qkv = self.qkv_proj.joined(x).unflatten(-1, (self.q_heads + 2 * self.kv_heads, self.head_dim))           # [T, Hq + 2 Hkv, D]
        turned = self.q_heads + self.kv_heads
        qk, v = qkv[:, :turned], qkv[:, turned:]
        if self.q_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, : self.q_heads]), self.k_norm(qk[:, self.q_heads :])), dim=1)
        qk = rotate(qk, *rotary)
        q, k = qk[:, : self.q_heads], qk[:, self.q_heads :]
        seen = cache.attend(
            self.layer, q, k, v, step, is_causal=True, scale=self.scale, window_size=self.window_size, softcap=self.softcap or None,
        )
        return seen.flatten(-2)

    def forward(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], step: Step, cache: PagedCache) -> torch.Tensor:
        """x [T, C] -> [T, C], summed over the ranks."""
        return self.o_proj(self.heads(x, rotary, step, cache))

    def shards(self, prefix: str) -> Iterator[Shard]:
        yield from self.qkv_proj.shards(prefix)
        yield from self.o_proj.shards(prefix)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                yield from norm.shards(prefix)
