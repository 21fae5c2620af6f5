"""One model run with its KV placed in several ways, side by side: benchmarks/cooperation.py does it on a host, gpu-check on a device.

The ways take turns, chunk by chunk and token by token, over the same tokens (the first way's choice), and every logit is compared with the
first way's. Times are the host's clock around a step, with the device idle before and after it: what a user waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch

from hetero_attn.models.cache import PagedCache
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.gathering import copies_here
from hetero_attn.models.placing import Placing, layer_bytes, make_placing
from hetero_attn.parallel.placement import ALL_DEVICE, AUTO, BUFFERS
from hetero_attn.parallel.trace import Event, Recorder


@dataclass
class Way:
    """One placement: its cache, what each chunk and token took, and how far its logits were from the first way's: the largest difference
    in the prompt and in decoding, and of how many steps the likeliest token was another. events: of the last chunk."""

    name: str
    placing: Placing
    cache: PagedCache
    sequence: int
    chunk_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    prompt_apart: float = 0.0
    token_apart: float = 0.0
    others: int = 0
    events: list[Event] = field(default_factory=list)

    def ratios(self, first: Way) -> tuple[float, float]:
        """A chunk's and a token's time, in the first way's beside it: medians."""
        return tuple(median(own / base for own, base in zip(mine, its))
                     for mine, its in ((self.chunk_s, first.chunk_s), (self.token_s, first.token_s)))


def limits(decoder: Decoder, tokens: int) -> dict[str, tuple[str | int, int | None]]:
    """Of each way, the placement asked for and the device's bytes: half has what half of the layers' KV and the buffers need."""
    layers, blocks = decoder.config.layers, PagedCache.blocks_for(tokens, 1, decoder.kv_block_size)
    figures = Placing(profile=decoder.profile).figures(decoder, 1)
    room = (layers // 2 + BUFFERS + copies_here(decoder)) * layer_bytes(decoder, blocks)
    return {"all-device": (ALL_DEVICE, None), "half": (AUTO, figures.weights + figures.activations + figures.reserve + room),
            "all-host": (layers, None)}


def prepare(decoder: Decoder, name: str, asked: str | int, limit: int | None, tokens: int) -> Way:
    """A way with an empty cache. Raises DeviceMemoryError."""
    decoder.placing = make_placing(decoder, decoder.profile, asked, limit)
    cache = decoder.new_cache(tokens, 1)
    return Way(name, decoder.placing, cache, cache.add_sequence())


def run(
    decoder: Decoder, ways: list[Way], prompt: list[int], new: int, chunk: int, told: Callable[[int], None] = lambda done: None
) -> float:
    """All ways through prompt and `new` tokens -> the largest logit of the first way. told: of tokens that are through."""
    size, token, end = 0.0, 0, len(prompt)
    for turn, start in enumerate([*range(0, end, chunk), *range(end, end + new)]):
        tokens, logits = prompt[start : start + chunk] or [token], {}
        for place in range(len(ways)):
            way = ways[(place + turn) % len(ways)]
            decoder.placing, decoder.recorder = way.placing, Recorder(decoder.device) if start < end <= start + chunk else None
            step = way.cache.step([way.sequence], [len(tokens)], tokens)
            settle(decoder.device)
            began = time.perf_counter()
            logits[way.name] = decoder(step, way.cache)
            settle(decoder.device)
            (way.chunk_s if start < end else way.token_s).append(time.perf_counter() - began)
            if decoder.recorder is not None:
                way.events, decoder.recorder = decoder.recorder.events(), None
        first = logits[ways[0].name]
        size, token = max(size, first.abs().max().item()), int(first[0].argmax())
        for way in ways:
            apart = torch.nan_to_num((logits[way.name] - first).abs(), nan=float("inf")).max().item()
            if start < end:
                way.prompt_apart = max(way.prompt_apart, apart)
            else:
                way.token_apart = max(way.token_apart, apart)
            way.others += int(logits[way.name][0].argmax()) != token
        told(min(start + len(tokens), end + new))
    return size


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
