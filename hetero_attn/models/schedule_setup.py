"""From a profile to a loaded model's schedule: what rank 0 says, what must be measured first, and the same object on every rank.

Profiles may differ between ranks and a cut must not, so rank 0's settings go to all. `auto` needs costs: the overlay's, which
`hetero-attn tune --schedule` wrote for this dtype, codec, communicator and these hosts, or a few seconds' measurement (LOAD_S; longer only
where one call of everything takes longer) when the model is loaded, where something can be gained at all: between hosts, or on devices, and
by steps long enough to be cut. Ranks that share a host's processors have none to spare for a transfer, and stay plain; so do models whose
weights are streamed, which every part of the rows would load anew. A device that has product and sum as one operator tiles them by itself:
there `auto` cuts nothing, and where that operator does not take this group or dtype, it tiles.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from hetero_attn.collectives.choice import Choice
from hetero_attn.collectives.tuning import gather_hosts, share_json
from hetero_attn.communicator import Communicator
from hetero_attn.models.schedule_measure import LOAD_S, QUICK_ROWS, measure_coded_sum, measure_costs, windows_of
from hetero_attn.parallel.schedule_choice import Auto, Places, Plain, Schedule, Tiled, Weave
from hetero_attn.parallel.schedule_cost import CODED_SUM, Costs, from_settings
from hetero_attn.parallel.schedule_cut import Product, ProductTiles
from hetero_attn.profile import DeviceProfile, without_overlay
from hetero_attn.spec import dtype_name

log = logging.getLogger("hetero_attn")


def make_schedule(decoder, profile: DeviceProfile) -> Schedule:
    """The schedule of a loaded decoder. All ranks call this together. Raises ValueError for damaged costs in rank 0's overlay."""
    communicator = decoder.communicator
    if decoder.window is not None and communicator.world_size > 1 and communicator.rank == 0 and profile.schedule in ("weave", "tiled"):
        log.warning("schedule %s is not used, steps run plain: weights are streamed, every part of the rows would load them once more, "
                    "and sums hide behind the disk anyway; leave --memory-budget and window out, or schedule at auto", profile.schedule)
    if communicator.world_size == 1 or decoder.window is not None:                   # all ranks stream, or none (agreement.py)
        return Schedule()
    # Of a mixture of experts only attention's product could be fused: its other sums have none before them.
    fused = None if decoder.config.experts else communicator.fused_linear_reasons(decoder.dtype)
    asked, tuned = share_json(communicator, (_settings(decoder, profile) | {"fused": fused}, list(profile.overlap.measured_on)))
    if tuned and (here := conditions(decoder, asked["codec"])) != tuned:
        if communicator.rank == 0:
            log.warning("schedule: what hetero-attn tune --schedule measured is left aside, it holds for %s, and here is %s; run it again",
                        ", ".join(each for each in tuned if each not in here) or "other ranks",
                        ", ".join(each for each in here if each not in tuned) or "less")
        asked = share_json(communicator, _settings(decoder, without_overlay(profile, "overlap")) | {"fused": fused})
    if communicator.cta_choices:                                                     # the same on every rank
        communicator.use_ctas(*asked["ctas"])
    if asked["schedule"] == "auto" and asked["fused"] is not None:
        if not asked["fused"]:
            return Schedule()
        if communicator.rank == 0:
            log.info("schedule: tiled, because the device's product with all-reduce does not serve: %s", "; ".join(asked["fused"]))
        asked["schedule"] = Tiled.name
    costs = from_settings(asked["measured"], asked["pair_ns"], asked["efficiency"], asked["further_ms"])
    routes = codec_routes(communicator, asked["codec"])
    never = asked["schedule"] != "plain" and asked["places"]["min_tokens"] > asked["prefill_chunk"]
    if never and communicator.rank == 0:
        log.log(logging.INFO if asked["schedule"] == "auto" else logging.WARNING,
                "schedule %s cuts no step: overlap.min_tokens%s is %d and a prompt goes in steps of up to %d tokens; raise "
                "prefill_chunk or lower it", asked["schedule"], "_moe" if decoder.config.experts else "", asked["places"]["min_tokens"],
                asked["prefill_chunk"])
    if asked["schedule"] == "auto" and (costs is not None or worth_measuring(communicator)):
        if costs is None and (routes is not None or not never):
            costs = measure_costs(decoder, QUICK_ROWS, use_codec=routes, budget_s=LOAD_S)
        elif costs is not None and routes is not None and CODED_SUM not in costs.pieces:         # tuned while codec was none
            costs = replace(costs, pieces={**costs.pieces, CODED_SUM: measure_coded_sum(decoder, routes)})
        if communicator.codecs is not None:
            communicator.codecs.traffic.clear()                                      # no part of what the model will send
    return schedule_of(asked, None if costs is None else replace(costs, windows=windows_of(decoder.config)), routes)


def _settings(decoder, profile: DeviceProfile) -> dict[str, Any]:
    """What rank 0 says of a profile, as JSON holds it."""
    overlap = profile.overlap
    return {"schedule": profile.schedule, "codec": profile.codec, "places": asdict(places_of(decoder, profile)), "tiles": overlap.tiles,
            "parts": overlap.parts, "measured": overlap.measured, "pair_ns": overlap.pair_ns, "efficiency": overlap.efficiency,
            "further_ms": overlap.further_ms, "ctas": [overlap.attention_ctas, overlap.mlp_ctas],
            "prefill_chunk": profile.prefill_chunk}


def conditions(decoder, codec: str) -> list[str]:
    """What costs depend on beside the model and the number of ranks, as overlap.measured_on has it; all ranks call this together."""
    communicator = decoder.communicator
    hosts = [f"host {rank} {host}" for rank, host in enumerate(gather_hosts(communicator))]
    sent = "none" if codec == "auto" else codec                                      # exact sums are measured in both cases
    return [f"dtype {dtype_name(decoder.dtype)}", f"codec {sent}", f"communicator {type(communicator).__name__}", *hosts]


def schedule_of(asked: dict[str, Any], costs: Costs | None, coder: Callable[[bool], None] | None = None) -> Schedule:
    """The schedule of agreed settings: schedule, places, parts, tiles."""
    tiles = asked["places"]["tiles"]
    products = tuple(Product(**each) for each in asked["places"]["products"])
    places = Places(**asked["places"] | {"tiles": ProductTiles(**tiles) if tiles else None, "products": products})
    name, parts = asked["schedule"], asked["parts"]
    if name == "weave":
        return Weave(places, parts, costs)
    if name == "tiled":
        return Tiled(places, asked["tiles"], costs)
    if name == "auto" and costs is not None:
        return Auto(places, costs, parts, asked["tiles"], coder)
    return Plain(places)


def places_of(decoder, profile: DeviceProfile) -> Places:
    """What the planner knows of this rank's part of the model on the profile's device."""
    overlap, hardware, config = profile.overlap, profile.hardware, decoder.config
    tiles = None
    if overlap.tile_shape and hardware.units:
        tiles = ProductTiles(*overlap.tile_shape, max(hardware.units - units_of_sums(decoder.communicator, profile), 1))
    alignment = overlap.row_alignment or (overlap.tile_shape or hardware.matrix_shape or (1,))[0]
    layer = decoder.layers[0]
    # Every expert sees its part of the tokens, one expert after the other.
    each = {"share": config.experts_per_token / config.experts, "times": config.experts} if config.experts else {}
    products = (Product(sum(layer.attention.qkv_proj.sizes)), Product(config.hidden_size),
                Product(2 * len(decoder.partition.ffn), **each), Product(config.hidden_size, **each))
    return Places(overlap.shard_tokens, overlap.min_tokens_moe if config.experts else overlap.min_tokens, alignment, tiles, products,
                  decoder.communicator.world_size)


def units_of_sums(communicator: Communicator, profile: DeviceProfile) -> int:
    """How many of the device's units a sum beside products keeps from them: its CTAs, where it has some, which are fewer than those of a
    sum by itself (overlap.communication_units)."""
    overlap = profile.overlap
    if not communicator.cta_choices:
        return overlap.communication_units
    return max(overlap.attention_ctas or communicator.ctas_beside("o_proj"), overlap.mlp_ctas or communicator.ctas_beside("down_proj"))


def worth_measuring(communicator: Communicator) -> bool:
    """Whether a transfer leaves the processors alone: it goes to another host, or devices do it. The same answer on every rank."""
    on_device = torch.tensor([communicator.device.type != "cpu"])
    return bool(communicator.all_gather(on_device, sizes=[1] * communicator.world_size).all()) or len(set(gather_hosts(communicator))) > 1


def codec_routes(communicator: Communicator, codec: str) -> CodecRoutes | None:
    """How to send exactly or coded, where rank 0's profile leaves that open (codec 'auto') and the link would gain by a codec."""
    base = communicator if communicator.base is None else communicator.base
    choice = getattr(base, "choice", None)
    return CodecRoutes(base, choice) if codec == "auto" and choice is not None and choice.coded else None


class CodecRoutes:
    """Switches a group's communicator, on all ranks together, between its choice of routes as it is and the same without codecs."""

    def __init__(self, base: Communicator, coded: Choice) -> None:
        self._base, self._coded, self._exact = base, coded, coded.exact()

    def __call__(self, coded: bool) -> None:
        """Sums are coded from now on, or exact."""
        self._base.choice = self._coded if coded else self._exact
