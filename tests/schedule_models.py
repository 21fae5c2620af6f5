"""Small random decoders of every family for the tests of schedules, without a checkpoint: each rank draws its own slices.

What the ranks hold alike (norms, router, and everything rank 0 alone adds) is drawn alike; the rest need not fit together into one model,
since a schedule is compared with another one of the same weights.
"""

from __future__ import annotations

import random

import torch
from tiny_families import FAMILIES, SMALL

from hetero_attn.collectives import init_communicator
from hetero_attn.communicator import Communicator
from hetero_attn.models.config import ModelConfig
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.schedule_setup import make_schedule
from hetero_attn.parallel.schedule_choice import Given
from hetero_attn.profile import load_profile
from hetero_attn.registry import linear_backend

TOLERANCE = 2e-5                                        # of the largest logit: fp32, sums in another order
REPLICATED = ("norm", "router")


def family_decoder(name: str, communicator: Communicator, *, dtype: torch.dtype = torch.float32, vocabulary: str = "sharded") -> Decoder:
    """A family's decoder with random weights."""
    model_type, keys = FAMILIES[name]
    config = ModelConfig.from_keys({**SMALL, "model_type": model_type, **keys})
    profile = load_profile("cpu", sets=["kv_block_size=4"])
    decoder = Decoder(config, communicator, dtype=dtype, vocabulary=vocabulary, kv_block_size=4, profile=profile)
    decoder.use_backend(linear_backend(profile))
    shared, own = torch.Generator().manual_seed(5), torch.Generator().manual_seed(100 + communicator.rank)
    with torch.no_grad():
        for key, parameter in decoder.named_parameters():
            norm = "norm" in key
            noise = torch.randn(parameter.shape, generator=shared if any(word in key for word in REPLICATED) else own)
            parameter.copy_((0.0 if decoder.config.norm_weight_offset else 1.0) + 0.2 * noise if norm else 0.15 * noise)
    return decoder.eval()


def random_batch(draw: random.Random, most: int = 5) -> tuple[list[int], list[int]]:
    """(tokens in the cache, new tokens) of each sequence: prefills, chunked ones, and decoding sequences beside them."""
    sequences = draw.randint(1, most)
    past = [draw.choice((0, 0, 1, 3, 7, 12)) for _ in range(sequences)]
    return past, [draw.choice((1, 1, 2, 5, 9, 17)) if held else draw.choice((1, 2, 6, 11, 19)) for held in past]


def run_batch(decoder: Decoder, past: list[int], new: list[int], first: int = 7) -> list[torch.Tensor]:
    """Fill the cache with `past`, run `new` in one step and one further token of each sequence: the logits [rows, vocab] of both steps.

    The decoder's schedule serves all of it. The last step is there to see what the step before has left in the cache.
    """
    cache = decoder.new_cache(sum(past) + sum(new) + len(past), len(past))
    ids = [cache.add_sequence() for _ in past]
    generator = torch.Generator().manual_seed(first)

    def step(counts: list[int]) -> torch.Tensor:
        chosen = [(identity, count) for identity, count in zip(ids, counts) if count]
        tokens = torch.randint(3, decoder.config.vocab_size, (sum(counts),), generator=generator)
        return decoder(cache.step([i for i, _ in chosen], [count for _, count in chosen], tokens, last_only=False), cache)

    if any(past):
        step(past)
    return [step(new), step([1] * len(past))]


def apart(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference over the largest value; inf where anything is not finite."""
    assert [each.shape for each in found] == [each.shape for each in expected]
    scale = max(each.abs().max().item() for each in expected)
    return max(torch.nan_to_num((a - b).abs(), nan=float("inf")).max().item() for a, b in zip(found, expected)) / scale


def auto_on_a_link(tokens: int, hidden: int, ffn: int) -> dict:
    """One rank of `schedule: auto` with `codec: auto` on the link it finds itself on: what was measured, what a prompt of so many tokens
    got by it, and how far its logits lie from the plain schedule's with exact sums."""
    torch.set_num_threads(1)
    profile = load_profile("cpu", sets=["codec=auto", "schedule=auto", "overlap.min_tokens=64", "overlap.shard_tokens=16"])
    with init_communicator(profile) as communicator:
        keys = {"model_type": "llama", "vocab_size": 64, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                "hidden_act": "silu"}
        decoder = Decoder(ModelConfig.from_keys(keys), communicator, dtype=torch.float32, profile=profile)
        decoder.use_backend(linear_backend(profile))
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        schedule = make_schedule(decoder.eval(), profile)
        decoder.schedule = Given()
        exact = run_batch(decoder, [0], [tokens])
        assert not communicator.codecs.traffic.sites, "measured sums are no traffic, and these were exact"
        decoder.schedule = schedule
        found = run_batch(decoder, [0], [tokens])
        cut, coded = schedule.choose([tokens], [tokens]) if schedule.name == "auto" else (None, False)
        offered = bool(getattr(schedule, "use_codec", None))
        return {"schedule": schedule.name, "offered": offered, "coded": coded, "cut": str(cut), "settings": schedule.costs.settings(),
                "pair_ns": schedule.costs.pair_s * 1e9, "efficiency": schedule.costs.efficiency, "apart": apart(found, exact),
                "sites": sorted(communicator.codecs.traffic.sites), "bits": communicator.codecs.traffic.total().bits_per_value}
