"""How often attention holds the KV of a layer beside its pages: what placement has to leave free on a rank's device.

A backend that cannot read pages where they lie gathers them first (Backend.gathered_copies), at 256K tokens a GiB and more a layer. It is
asked for the two kinds of call that a device gets, a prompt's chunk and a decoded token, in every window that the model has. A rank that
runs asks whoever would be chosen; a plan, made for machines that are elsewhere, the first of the profile's list that takes the call.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hetero_attn import registry
from hetero_attn.backend import AbsentBackend, UnsupportedError
from hetero_attn.models.config import ModelConfig
from hetero_attn.parallel.sharding import Partition
from hetero_attn.profile import DeviceProfile
from hetero_attn.spec import AttentionSpec


def copies_here(decoder) -> int:
    """Of a loaded decoder, by the backends that serve it on this machine."""
    found = [0]
    with decoder.choosing():
        name = registry.chosen_name(None)
        for spec in calls(decoder.config, decoder.partition, decoder.dtype, decoder.device.type, decoder.profile, decoder.kv_block_size):
            try:
                chosen = (registry.first_without_objection(spec, registry.current_profile(spec.device), quiet=True) if name is None
                          else registry.select(spec, name))
            except UnsupportedError:                 # the call itself will say so, with all reasons
                continue
            found.append(chosen.backend.gathered_copies(spec))
    return max(found)


def copies_planned(config: ModelConfig, partition: Partition, dtype: torch.dtype, profile: DeviceProfile) -> int:
    """Of a rank on the profile's device, which need not be here."""
    serving = [backend for name in profile.backends if not isinstance(backend := registry.find(name), AbsentBackend)]
    found = [0]
    for spec in calls(config, partition, dtype, profile.device, profile, profile.kv_block_size):
        chosen = next((backend for backend in serving if not backend.unsupported_reasons(spec)), None)
        found.append(chosen.gathered_copies(spec) if chosen is not None else 0)
    return max(found)


def calls(
    config: ModelConfig, partition: Partition, dtype: torch.dtype, device: str, profile: DeviceProfile | None, block_size: int
) -> Iterator[AttentionSpec]:
    """The calls of attention that differ in more than length: of each window, a chunk and one token of the longest sequence."""
    chunk = min(profile.prefill_chunk if profile else 512, config.context_length)
    for window in dict.fromkeys(config.windows):
        for q_len in (chunk, 1):
            yield AttentionSpec(
                device, dtype, 1, len(partition.q_heads), len(partition.kv_heads), q_len, config.context_length, config.head_dim,
                config.head_dim, is_causal=True, scale=config.attention_scale, softcap=config.attention_softcap,
                window_size=(-1, -1) if window is None else (window - 1, -1), varlen=True, total_q=q_len, page_size=block_size,
            )
