"""FastAttention's tiling-AllReduce by itself: one row-parallel linear and its all-reduce, whole and in tiles, on a link."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from hetero_attn.collectives import init_communicator
from hetero_attn.collectives.link import slowest
from hetero_attn.parallel.linear import RowParallelLinear
from hetero_attn.parallel.schedule_choice import linear_tiles
from hetero_attn.parallel.schedule_cost import Curve
from hetero_attn.parallel.schedule_cut import split_tiles
from hetero_attn.parallel.schedule_order import Cut
from hetero_attn.parallel.tiled_linear import tiled_linear
from hetero_attn.profile import load_profile
from hetero_attn.registry import linear_backend

TILES = (2, 4, 8)


def measure(features: int, hidden: int, rows: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """One rank's part; the same facts on every rank. features: of both ranks together."""
    profile = load_profile("cpu")
    with init_communicator(profile) as communicator:
        own = range(features // communicator.world_size)
        layer = RowParallelLinear(communicator, "o_proj", features, hidden, own, site="o_proj", dtype=torch.float32, device="cpu")
        layer.linear = communicator.linear = linear_backend(profile).linear
        torch.nn.init.normal_(layer.weight, std=features**-0.5)
        return [each for count in rows for each in _cell(layer, torch.randn(count, len(own)), rounds)]


def _cell(layer: RowParallelLinear, x: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    communicator, count = layer.communicator, x.shape[0]
    summand = torch.randn(count, layer.out_features)
    calls: dict[str, Callable[[], Any]] = {
        "product": lambda: layer.partial(x), "sum": lambda: communicator.all_reduce(summand, site="o_proj"), "plain": lambda: layer(x),
    }
    product, summed = _curves(layer, x)
    cuts = {"chosen": linear_tiles(count, product, summed, alignment=8)}       # as the cost model has it; the others beside it
    for tiles in TILES:
        cut = Cut.at(count, (), [split_tiles(count, tiles, product(count), summed(count), alignment=8)])
        if cut.overlaps and cut not in cuts.values():                          # few rows, or one lane much the longer: nothing to cut
            cuts[f"{tiles}"] = cut
    for name, cut in cuts.items():
        calls[name] = lambda cut=cut: tiled_linear(layer, x, cut.tiles[0])
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in calls if number % 2 else reversed(calls):
            seconds = _timed(communicator, calls[name])
            if number:
                times[name].append(seconds)
    middle = {name: median(own) for name, own in times.items()}
    least = min(middle["product"], middle["sum"])
    def hidden(name: str, cut: Cut) -> float:
        return (middle["plain"] - middle[name]) / (least * (1 - 1 / len(cut.tiles[0]))) if cut.overlaps else 0.0

    return [{
        "rows": count, "tiles": name, "cut": str(cut), "product_s": middle["product"], "sum_s": middle["sum"], "plain_s": middle["plain"],
        "tiled_s": middle[name], "hidden": hidden(name, cut),
    } for name, cut in cuts.items()]


def _curves(layer: RowParallelLinear, x: torch.Tensor) -> tuple[Curve, Curve]:
    """Seconds of the product and of the sum against rows, at a few: medians of the slowest rank."""
    communicator, points = layer.communicator, ([], [])
    for rows in sorted({max(1, len(x) // part) for part in (1, 2, 4, 8, 16)}):
        summand = torch.randn(rows, layer.out_features)
        calls = (lambda rows=rows: layer.partial(x[:rows]), lambda summand=summand: communicator.all_reduce(summand, site="o_proj"))
        for own, call in zip(points, calls):
            own.append((rows, median(_timed(communicator, call) for _ in range(3))))
    return Curve(points[0]), Curve(points[1])


def _timed(communicator, call: Callable[[], Any]) -> float:
    communicator.barrier(site="bench")
    began = time.perf_counter()
    call()
    return slowest(communicator, time.perf_counter() - began, site="bench")
