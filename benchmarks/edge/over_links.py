"""Ranks behind emulated home-network links, weights held: a token's time with each way of summing, beside what the planner says.

One run for each number of ranks: the model is loaded once, the link measured as `hetero-attn tune` does it, and the ways take turns, each
of them first, second, ... in as many rounds, so that all of them meet the same machine (with a fixed order two ways of the same route
differed by 17 %); one of the ways leaves the layers' sums out, which tells what the products take while all ranks share two cores. The
planner says what the sums add to that, twice: from the numbers a person would type (--link 1ms,300Mbit), and from what tune has measured.
"""

from __future__ import annotations

import dataclasses
import statistics
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from edge.ranks import greedy
from hetero_attn.collectives import tuning
from hetero_attn.collectives.choice import Choice, Fixed, Route, from_json
from hetero_attn.collectives.link import measure_codecs
from hetero_attn.hardware import Link
from hetero_attn.models.control import serve
from hetero_attn.models.hosts import Host, Hosts
from hetero_attn.models.load import load_model
from hetero_attn.models.planning import plan_model
from hetero_attn.profile import load_profile

RATE_MBIT, DELAY_MS = 300, 1
TYPED = (1.0, 0.2, 0.0, 300.0, 300.0)                # what `plan --link 1ms,300Mbit` makes of it
WAYS = {"star": ("algorithm=star",), "one_shot": ("algorithm=one_shot",), "auto": (), "auto, low-bit": ("codec=auto",)}
PRODUCTS = "products alone"
MEASURE = tuning.THOROUGH._replace(budget_s=8.0)


def in_rank(folder: str, tokens: int, rounds: int) -> dict:
    """Every rank's part; rank 0 returns seconds of each token by way, the route of a row's sum, and the link as it was measured."""
    torch.set_num_threads(1)
    # schedule=plain: the automatic one would turn codecs on and off itself, step by step.
    model = load_model(folder, load_profile("edge", sets=("codec=auto", "schedule=plain")), cache_tokens=64)
    base = model.communicator if model.communicator.base is None else model.communicator.base
    found = tuning.survey(base, tuning.gather_hosts(base), MEASURE)
    found = dataclasses.replace(found, codecs=measure_codecs(base, tuning.codecs_of("auto")))
    ways = {"star": Fixed(Route("star")), "one_shot": Fixed(Route("one_shot")), "auto": found.table(),
            "auto, low-bit": found.table(codec="auto")}
    sent = tuning.share_json(base, {name: way.to_json() for name, way in ways.items()} if base.rank == 0 else None)
    ways: dict[str, Choice] = {name: from_json(text) for name, text in sent.items()}
    times: dict[str, list[float]] = {name: [] for name in (PRODUCTS, *ways)}
    for number in range(rounds):
        for name in turned(list(times), number):
            base.choice = ways.get(name, ways["auto"])
            with sums_left_out(model.communicator) if name == PRODUCTS else nullcontext():
                if base.rank:
                    serve(model)
                else:
                    times[name] += greedy(model, tokens)[0][1:]
            base.barrier(site="links")
    nbytes = model.config.hidden_size * model.dtype.itemsize
    routes = {name: list(way.pick("all_reduce", nbytes, model.dtype)) for name, way in ways.items()}
    return {"times": times, "routes": routes, "settings": found.settings() if base.rank == 0 else {}}


def turned(names: list[str], number: int) -> list[str]:
    """The names from another one on in each round."""
    place = number % len(names)
    return names[place:] + names[:place]


@contextmanager
def sums_left_out(communicator):
    """The layers' sums are this rank's summands alone in the block: the text is none, the products are the same."""
    communicator.all_reduce = lambda x, *, site="": x
    try:
        yield
    finally:
        del communicator.all_reduce


def measured(network, folder: Path, tokens: int, rounds: int) -> dict:
    """The figures of one network."""
    found = network.run(in_rank, (str(folder), tokens, rounds), timeout_s=170)[0]
    return {"ranks": network.ranks, "token_s": {name: statistics.median(each) for name, each in found["times"].items()},
            "quartiles_s": {name: statistics.quantiles(each, n=4)[::2] for name, each in found["times"].items()},
            "routes": found["routes"], "link": found["settings"], "sums_s": predicted(folder, network.ranks, found["settings"])}


def predicted(folder: Path, count: int, settings: dict) -> dict:
    """Way -> [typed, tuned]: the planner's seconds of all of a token's sums."""
    from hetero_attn.collectives.cost import from_settings

    link = Link(**{name.removeprefix("link."): tuple(value) if isinstance(value, list) else value for name, value in settings.items()})
    says = {}
    for name, sets in WAYS.items():
        profile = load_profile("edge", sets=(*sets, "hardware.memory_gbps=10", "hardware.memory_gib=8"))
        plans = [plan_model(folder, Hosts((Host(profile, "cpu"),) * count, from_settings(*TYPED))),
                 plan_model(folder, Hosts((Host(dataclasses.replace(profile, link=link), "cpu"),) * count))]
        says[name] = [plan.reduce_s for plan in plans]
    return says
