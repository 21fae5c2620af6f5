"""CPU-GPU cooperation for real: a model's KV on the device, half of it in host memory, and all of it, against one another.

Held to: the same logits (the prompt's kernels see the same numbers in the same places; decoding may be attended by another backend on the
host), device memory within the budget that `half` was given, and less of it the more layers lie on the host. Times and how much of a
chunk's copies hides behind computing are told without a bar: they are the bus' and the host's. Each way runs once alone, for its memory and
to warm up, then all take turns for the times. On a CPU (a rehearsal) both sides are the same memory, and memory is the cache's account.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from hetero_attn import registry
from hetero_attn.backend import UnsupportedError
from hetero_attn.communicator import SoloCommunicator
from hetero_attn.models.config import ModelConfig
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.gathering import calls
from hetero_attn.models.placing import weight_bytes
from hetero_attn.parallel.trace import FETCHES, STORES
from hetero_attn.profile import load_profile
from hetero_attn.quantity import shown_bytes, shown_seconds
from hetero_attn.testing.cooperation import Way, limits, prepare, run, settle
from hetero_attn.testing.gpu.outcome import Figure, Outcome, judged
from hetero_attn.testing.random_weights import randomised

VOCAB = 8192
FAR = {"cuda": 2e-2, "cpu": 0.0}     # of the largest logit: 16-bit layers by two backends; on the CPU one backend serves both sides


@dataclass(frozen=True)
class Scenario:
    """A random model of Llama's shape, a prompt in chunks, and tokens decoded after it. context, chunk and new: tokens."""

    hidden: int
    layers: int
    ffn: int
    q_heads: int
    kv_heads: int
    context: int
    chunk: int
    new: int
    dtype: torch.dtype

    def config(self) -> ModelConfig:
        return ModelConfig.from_keys({
            "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": self.hidden, "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers, "num_attention_heads": self.q_heads, "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 1 << 17, "rms_norm_eps": 1e-5, "hidden_act": "silu"})


WHOLE = Scenario(4096, 16, 11008, 32, 8, 32768, 512, 32, torch.float16)                       # 5.7 GB of weights, 2.1 GB of KV a way
QUICK = Scenario(4096, 8, 11008, 32, 8, 8192, 512, 16, torch.float16)
REHEARSAL = Scenario(64, 6, 96, 4, 2, 256, 64, 3, torch.float32)


def cooperation(device: torch.device, quick: bool) -> Outcome:
    """Logits, device memory, times."""
    return compared(device, REHEARSAL if device.type == "cpu" else QUICK if quick else WHOLE)


def compared(device: torch.device, scenario: Scenario) -> Outcome:
    """The outcome for one scenario."""
    profile = load_profile(None, device=device.type, sets=[f"prefill_chunk={scenario.chunk}"])
    decoder = random_decoder(scenario, device, profile)
    tokens = scenario.context + scenario.new
    asked = limits(decoder, tokens)
    prompt = torch.randint(3, VOCAB, (scenario.context,), generator=torch.Generator().manual_seed(2)).tolist()
    held = {name: alone(decoder, name, *asked[name], prompt, scenario) for name in asked}
    ways = [prepare(decoder, name, *asked[name], tokens) for name in asked]
    size = run(decoder, ways, prompt, scenario.new, scenario.chunk)
    wrong, figures = list(faults(ways, held, size, device.type)), []
    table = [("way", "layers on the host", "device memory", "a chunk", "a token", "fetched", "stored", "q, k, v, o", "logits apart")]
    for way in ways:
        chunk_ratio, token_ratio = way.ratios(ways[0])
        traffic, apart = way.placing.traffic, max(way.prompt_apart, way.token_apart) / size
        table.append((way.name, f"{len(way.cache.placement.host)} of {scenario.layers}", shown_bytes(held[way.name]),
                      f"{shown_seconds(sorted(way.chunk_s)[len(way.chunk_s) // 2])}, {chunk_ratio:.2f} x",
                      f"{shown_seconds(sorted(way.token_s)[len(way.token_s) // 2])}, {token_ratio:.2f} x",
                      *map(shown_bytes, (traffic.fetched, traffic.stored, traffic.crossed)), f"{apart:.1e}"))
        if way is not ways[0]:
            figures += [Figure(f"{way.name}: a chunk, all-device's time over its", 1 / chunk_ratio, "x"),
                        Figure(f"{way.name}: a token, all-device's time over its", 1 / token_ratio, "x")]
            if (share := hidden(way, ways[0])) is not None:
                figures.append(Figure(f"{way.name}: of the last chunk's copies hidden behind computing", share, ""))
    text = (f"{scenario.layers} layers, hidden {scenario.hidden}, {scenario.kv_heads} KV heads, {scenario.context} tokens in chunks of "
            f"{scenario.chunk}, {scenario.new} decoded; {serving(decoder)}")
    return judged(text, figures, table, wrong)


def random_decoder(scenario: Scenario, device: torch.device, profile) -> Decoder:
    """Weights scaled so that the residual stream stays near 1."""
    decoder = Decoder(scenario.config(), SoloCommunicator(device=device), dtype=scenario.dtype, device=device,
                      kv_block_size=profile.kv_block_size, profile=profile)
    decoder.use_backend(registry.linear_backend(profile), registry.norm_backend(profile))
    return randomised(decoder)


def alone(decoder: Decoder, name: str, asked: str | int, limit: int | None, prompt: list[int], scenario: Scenario) -> int:
    """Bytes of the device at most while one way runs by itself, weights included."""
    device = decoder.device
    settle(device)
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)
    way = prepare(decoder, name, asked, limit, len(prompt) + scenario.new)
    run(decoder, [way], prompt, 2, scenario.chunk)
    if device.type != "cpu":
        return torch.get_device_module(device).max_memory_allocated(device)
    account = way.placing.account
    return account.peak + (weight_bytes(decoder) if account.limit is None else 0)


def faults(ways: list[Way], held: dict[str, int], size: float, kind: str):
    """What is not as it has to be, a line each. held: of each way, bytes of the device; size: the largest logit."""
    for way in ways[1:]:
        for what, apart in (("prompt", way.prompt_apart), ("decoding", way.token_apart)):
            if not apart <= FAR[kind] * size:
                yield f"{way.name}: logits of the {what} differ by {apart / size:.2g} of the largest, at most {FAR[kind]:g} is expected"
        limit = way.placing.limit
        if limit is not None and held[way.name] > limit:
            yield f"{way.name}: {shown_bytes(held[way.name])} of the device were held, its budget is {shown_bytes(limit)}"
        if not way.cache.placement.host or not way.placing.traffic.fetched or not way.placing.traffic.crossed:
            yield f"{way.name}: no layer's KV was fetched or attended on the host, so nothing was compared"
    for before, after in pairwise(ways):
        if held[after.name] >= held[before.name]:
            yield f"{after.name}: takes {shown_bytes(held[after.name])} of the device, {before.name} {shown_bytes(held[before.name])}"


def hidden(way: Way, first: Way) -> float | None:
    """Of the copies beside the last chunk, the share that did not lengthen it; None where nothing was copied."""
    by_lane = [sum(event.end - event.begin for event in way.events if event.lane == lane) for lane in (FETCHES, STORES)]
    longer = max(0.0, way.chunk_s[-1] - first.chunk_s[-1])
    return max(0.0, 1 - longer / max(by_lane)) if max(by_lane) > 0 else None


def serving(decoder: Decoder) -> str:
    """Which backends attend: a chunk on the device, and a token on the host."""
    def name(device: str, profile, q_len: int) -> str:
        specs = calls(decoder.config, decoder.partition, decoder.dtype, device, profile, decoder.kv_block_size)
        try:
            spec = next(each for each in specs if (each.q_len == 1) == (q_len == 1))
            return registry.first_without_objection(spec, profile, quiet=True).name
        except UnsupportedError:
            return "nobody"

    device = decoder.device.type
    host = decoder.profile if device == "cpu" else load_profile("cpu")
    return f"{name(device, decoder.profile, 2)} attends on the {device} device, {name('cpu', host, 1)} on the host"
