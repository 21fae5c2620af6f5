"""The decoder: embedding, layers, final norm and head, over packed tokens [T, C].

A layer is two blocks, attention and MLP, each ending in a sum over the ranks. Short steps run layer after layer, every rank norming
every row: RowParallelLinear sums (the experts, in MixtureOfExperts), and that costs the fewest messages. Longer ones are given a cut by the
decoder's schedule, and hetero_attn.parallel.schedule runs the same blocks by it, the residual sharded by rows and the sums in flight.
Beside those, communication happens in the embedding and in the head, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from hetero_attn.backend import Backend
from hetero_attn.communicator import Communicator
from hetero_attn.models.attention import Attention
from hetero_attn.models.cache import PagedCache, Step
from hetero_attn.models.config import ModelConfig, ModelError
from hetero_attn.models.mlp import MLP
from hetero_attn.models.moe import MixtureOfExperts
from hetero_attn.models.norm import RMSNorm
from hetero_attn.models.rope import RotaryEmbedding
from hetero_attn.parallel.linear import VocabularyEmbedding, VocabularyHead
from hetero_attn.parallel.placement import DeviceMemoryError, out_of_memory_text
from hetero_attn.parallel.schedule import Block, CommunicationLane, SumNorm, run_blocks
from hetero_attn.parallel.schedule_choice import Schedule
from hetero_attn.parallel.schedule_order import Cut
from hetero_attn.parallel.sharding import Partition, Shard
from hetero_attn.parallel.trace import recorded
from hetero_attn.registry import use_profile


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with post_norms (Gemma 2) a norm of each summand before it is added."""

    def __init__(self, config: ModelConfig, layer: int, communicator: Communicator, partition: Partition, *, dtype, device):
        super().__init__()
        def norm(name: str) -> RMSNorm:
            return RMSNorm(name, config.hidden_size, config.rms_norm_eps, config.norm_weight_offset, dtype=dtype, device=device)

        block = MixtureOfExperts if config.experts else MLP
        self.input_norm = norm("input_layernorm")
        self.attention = Attention(config, layer, communicator, partition, dtype=dtype, device=device)
        self.mlp_norm = norm("pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm")
        self.mlp = block(config, layer, communicator, partition, dtype=dtype, device=device)
        self.post_attention_norm = norm("post_attention_layernorm") if config.post_norms else None
        self.post_mlp_norm = norm("post_feedforward_layernorm") if config.post_norms else None

    def attention_part(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], step: Step, cache: PagedCache) -> torch.Tensor:
        """x [T, C], the residual stream -> what attention adds to it [T, C]."""
        y = self.attention(self.input_norm(x), rotary, step, cache)
        return y if self.post_attention_norm is None else self.post_attention_norm(y)

    def mlp_part(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, C], the residual stream -> what the MLP adds to it [T, C]."""
        y = self.mlp(self.mlp_norm(x))
        return y if self.post_mlp_norm is None else self.post_mlp_norm(y)

    def forward(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], step: Step, cache: PagedCache) -> torch.Tensor:
        x = x + self.attention_part(x, rotary, step, cache)
        return x + self.mlp_part(x)

    def blocks(self, following: RMSNorm) -> tuple[Block, Block]:
        """The layer as a schedule runs it, for context (rotary, step, cache). following: the norm after it, the next layer's first."""
        attention, mlp = self.attention, self.mlp
        return (
            Block(attention.o_proj.site, lambda x, context: attention.heads(x, *context), attention.o_proj.partial,
                  sum_norm(self.mlp_norm, self.post_attention_norm)),
            Block(mlp.site, lambda x, context: mlp.columns(x), mlp.summand, sum_norm(following, self.post_mlp_norm)),
        )

    def shards(self, prefix: str, names: set[str]) -> Iterator[Shard]:
        for norm in (self.input_norm, self.mlp_norm, self.post_attention_norm, self.post_mlp_norm):
            if norm is not None:
                yield from norm.shards(prefix)
        yield from self.attention.shards(f"{prefix}self_attn.")
        yield from self.mlp.shards(prefix, names)


def sum_norm(norm: RMSNorm, post_norm: RMSNorm | None) -> SumNorm:
    """A norm of the residual, and the one of the summand before it, as what follows a sum."""
    return SumNorm(norm.weight, norm.eps, norm.weight_offset, None if post_norm is None else post_norm.weight)


class Decoder(nn.Module):
    """One rank of a tensor-parallel decoder. Made by load_model; parameters are empty until the checkpoint's shards are read.

    config, communicator, partition, vocabulary ('sharded' | 'master'), dtype, device and profile (may be None) are attributes; so are
    schedule, which cuts a step's rows (the same on every rank), and recorder (None), which takes down what ran when. memory and window
    are the plan and the WeightWindow of a model that streams its weights (models/budget.py), else None. placing says where a cache's
    layers lie (models/placing.py); None: all on the device.
    """

    memory = window = placing = None

    def __init__(
        self,
        config: ModelConfig,
        communicator: Communicator,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        vocabulary: str = "sharded",
        kv_block_size: int = 16,
        profile=None,
        partition: Partition | None = None,
    ):
        """partition: this rank's part, None = an even one. Raises ModelError when the model cannot be cut for this world size (the text
        lists the sizes that work)."""
        super().__init__()
        try:
            self.partition = partition or Partition.of(
                communicator.rank, communicator.world_size, q_heads=config.q_heads, kv_heads=config.kv_heads,
                ffn=config.intermediate_size, vocab=config.vocab_size, vocabulary=vocabulary,
            )
        except ValueError as error:
            raise ModelError(str(error)) from None
        self.config, self.communicator, self.vocabulary = config, communicator, vocabulary
        self.dtype, self.device, self.profile, self.kv_block_size = dtype, torch.device(device), profile, kv_block_size
        self.schedule, self.recorder = Schedule(), None
        made = {"dtype": dtype, "device": self.device}
        self.embed = VocabularyEmbedding(communicator, config.vocab_size, config.hidden_size, self.partition, **made)
        self.layers = nn.ModuleList(DecoderLayer(config, i, communicator, self.partition, **made) for i in range(config.layers))
        self.norm = RMSNorm("norm", config.hidden_size, config.rms_norm_eps, config.norm_weight_offset, **made)
        tied = self.embed if config.tied_embeddings else None
        self.lm_head = VocabularyHead(communicator, config.vocab_size, config.hidden_size, self.partition, tied=tied, **made)
        self.rotary = RotaryEmbedding(config.rotary, self.device)

    def use_backend(self, backend: Backend, norm: Backend | None = None) -> None:
        """Every product of this rank goes through `backend`'s linear, every norm through the rms_norm of `norm` (default: `backend`).
        (Attention is chosen call by call.)"""
        norm = norm or backend
        self.communicator.linear = backend.linear
        for module in self.modules():
            if hasattr(module, "linear"):
                module.linear = backend.linear
            elif isinstance(module, RMSNorm):
                module.rms_norm = norm.rms_norm

    def new_cache(self, max_tokens: int, max_sequences: int, layers: int | None = None) -> PagedCache:
        """An empty cache that holds max_tokens tokens, however they are spread over up to max_sequences sequences.

        Of all layers, or on the device of so many first ones. Raises DeviceMemoryError where the device, or the host beside it, has no
        room for it.
        """
        num_blocks, placed = PagedCache.blocks_for(max_tokens, max_sequences, self.kv_block_size), {}
        if self.placing is not None and layers is None:
            placed = self.placing.of_cache(self, num_blocks, max_sequences)
        with self.out_of_memory(max_tokens):
            return self._cache(self.config.layers if layers is None else layers, num_blocks, max_sequences, placed)

    def _cache(self, layers: int, num_blocks: int, max_sequences: int, placed: dict[str, Any]) -> PagedCache:
        return PagedCache(
            layers=layers,
            num_blocks=num_blocks,
            block_size=self.kv_block_size,
            kv_heads=len(self.partition.kv_heads),
            head_dim=self.config.head_dim,
            dtype=self.dtype,
            device=self.device,
            max_sequences=max_sequences,
            context_length=self.config.context_length,
            **placed,
        )

    @contextmanager
    def out_of_memory(self, tokens: int) -> Iterator[None]:
        """Without memory in the block: a DeviceMemoryError that says what to do, whoever refused. tokens: of the cache."""
        try:
            yield
        except (RuntimeError, DeviceMemoryError) as error:
            reason = str(error) if isinstance(error, DeviceMemoryError) else out_of_memory_text(error)
            if self.placing is None or reason is None:
                raise
            raise self.placing.refusal(self, reason, tokens) from error

    @torch.no_grad()
    def forward(self, step: Step, cache: PagedCache) -> torch.Tensor | None:
        """Runs the T packed tokens of `step`, filling the cache -> logits [N, vocab] fp32 of the rows step.logits_at.

        All ranks call it with the same step (under 'master', workers' tokens may be None, and they get None). Raises
        CommunicatorError when a rank is lost, UnsupportedError when no backend runs the attention, DeviceMemoryError.
        """
        with self.choosing(), self.out_of_memory(cache.num_blocks * cache.block_size), cache.running(step, self.recorder):
            rotary = self.rotary(step.positions, self.dtype)
            cut = self.schedule.cut(step.counts, step.lengths)
            if cut is not None:
                return self.logits(self.run_cut(rotary, step, cache, cut).index_select(0, step.logits_at))
            x = self.scaled(self.embed(step.tokens, step.total_q))
            recorder = None if cache.offloaded is None else self.recorder                # what copies run beside; else there is one lane
            for place, layer in enumerate(self.layers):
                with recorded(recorder, f"layers.{place}", step.total_q):
                    x = layer(x, rotary, step, cache)
            return self.logits(self.norm(x.index_select(0, step.logits_at)))

    def run_cut(
        self, rotary: tuple[torch.Tensor, torch.Tensor], step: Step, cache: PagedCache, cut: Cut, layers: int | None = None
    ) -> torch.Tensor:
        """The step's tokens through all layers, or the first `layers`, in the cut's order -> [T, C] under the norm that follows them."""
        hidden = self.embed.local(step.tokens, step.total_q)

        def embed(rows: range, lane: CommunicationLane) -> Callable[[], torch.Tensor]:
            mine, part = hidden[rows.start : rows.stop], next(at for at, pieces in enumerate(cut.entering) if rows in pieces)
            arrive = lane.start("embed", part, self.embed.operation, mine, site=self.embed.site)
            return lambda: self.scaled(arrive())

        contexts = {rows: (tuple(each[rows.start : rows.stop] for each in rotary), step.part(rows), cache)
                    for rows in dict.fromkeys((*cut.parts, *cut.entering[0]))}
        blocks = self.blocks()[: None if layers is None else 2 * layers]
        return run_blocks(blocks, self.layers[0].input_norm, embed, contexts, cut, self.communicator, self.recorder)

    def blocks(self) -> list[Block]:
        """All layers' blocks, in order."""
        following = [*(layer.input_norm for layer in self.layers[1:]), self.norm]
        return [block for layer, norm in zip(self.layers, following) for block in layer.blocks(norm)]

    def choosing(self) -> AbstractContextManager:
        """Inside it, attention is chosen by the model's own profile."""
        return nullcontext() if self.profile is None else use_profile(self.profile)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """Embedded rows [T, C] as the first layer takes them."""
        if self.config.embedding_scale != 1.0:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)         # rounded to the model's dtype, as it was trained
        return x

    def logits(self, normed: torch.Tensor) -> torch.Tensor | None:
        """normed [N, C], rows under the final norm -> logits [N, vocab] fp32, or None on the workers under 'master'."""
        if self.vocabulary == "master" and self.communicator.rank != 0:
            return None
        logits = self.lm_head(normed)
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def shards(self, names: set[str]) -> Iterator[Shard]:
        """The slices of the checkpoint this rank needs; `names` are the tensors it has."""
        yield from self.embed.shards("model.embed_tokens")
        for index, layer in enumerate(self.layers):
            yield from layer.shards(f"model.layers.{index}.", names)
        yield from self.norm.shards("model.")
        yield from self.lm_head.shards("lm_head")
