"""What each rank of the benchmark does: load within a budget, generate, and time its disk alone, reading just what a token reads."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.models.budget import peak_bytes
from hetero_attn.models.control import Driver, serve
from hetero_attn.models.load import load_model
from hetero_attn.models.shard_folder import folder_name

PROMPT = [3, 14, 15, 92, 65, 35]
DEVICE = "254:0"                # of the root disk; the report says which was throttled


class Alone(Communicator):
    """One rank of a group without the others: its sums are its own summand, so its figures are its work and not a text."""

    def all_reduce(self, x, *, site=""):
        return x

    def all_gather(self, x, dim=0, *, sizes=None, site=""):
        return torch.cat([x] * self.world_size, dim)

    def broadcast(self, x, src=0, *, site=""):
        return x.zero_() if self.rank != src else x

    def barrier(self, *, site=""):
        pass


def throttled(name: str, mbytes_s: float | None) -> None:
    """Puts this process into a control group of its own whose reads are limited (version 1, root only)."""
    if mbytes_s is None:
        return
    group = Path("/sys/fs/cgroup/blkio") / name
    group.mkdir(exist_ok=True)
    (group / "blkio.throttle.read_bps_device").write_text(f"{DEVICE} {int(mbytes_s * 1e6)}\n")
    (group / "cgroup.procs").write_text(str(os.getpid()))


def generate(folder: str, options: dict, tokens: int, mbytes_s: float | None = None) -> dict:
    """A rank of a real group; token times on rank 0, memory and disk figures on all."""
    throttled(f"hetero-attn-bench-{os.getpid()}", mbytes_s)
    model = load_model(folder, "edge", cache_tokens=64, **options)
    found = {}
    if model.communicator.rank == 0:
        times, chosen, rows = greedy(model, tokens)
        found = {"first_s": times[0], "token_s": statistics.median(times[1:]), "times": times, "tokens": chosen, "logits": rows}
    else:
        serve(model)
    return found | figures(model)


def greedy(model, tokens: int) -> tuple[list[float], list[int], list[list[float]]]:
    """Rank 0's part: seconds of each token, the tokens, and the first eight logits of each."""
    times, chosen, rows, feed = [], [], [], PROMPT
    with Driver(model) as driver:
        driver.new_cache(64, 1)
        sequence = driver.add_sequence()
        for _ in range(tokens):
            began = time.perf_counter()
            logits = driver.forward([sequence], [len(feed)], feed)
            times.append(time.perf_counter() - began)
            rows.append(logits[0, :8].tolist())
            feed = [int(logits[0].argmax())]
            chosen += feed
    return times, chosen, rows


def over_links(folder: str, sets: tuple[str, ...], tokens: int) -> dict:
    """A rank behind an emulated link, weights held: token times, and what the planner's link model says of the sums."""
    from hetero_attn.collectives.choice import Route
    from hetero_attn.collectives.cost import from_settings, predict
    from hetero_attn.profile import load_profile

    torch.set_num_threads(1)
    model = load_model(folder, load_profile("edge", sets=sets), cache_tokens=64)
    communicator, hidden = model.communicator, model.config.hidden_size
    if communicator.rank:
        serve(model)
        return {}
    times, _, _ = greedy(model, tokens)
    world, nbytes = communicator.world_size, hidden * 2
    base = communicator if communicator.base is None else communicator.base
    route = base.choice.pick("all_reduce", nbytes, torch.bfloat16)
    link = from_settings(1.0, 0.2, 0.0, 300.0, 300.0)
    each = predict(link, "all_reduce", Route(route.algorithm), world, nbytes, widening=2.0)
    return {"token_s": statistics.median(times[1:]), "times": times, "route": list(route), "sums": 2 * model.config.layers,
            "predicted_sums_s": 2 * model.config.layers * each}


def alone(folder: str, rank: int, world_size: int, options: dict, tokens: int) -> dict:
    """One rank by itself, of a group that this host could not hold or would take too long to run."""
    os.environ.pop("RANK", None)
    own = Path(folder) / folder_name(rank, world_size)
    model = load_model(own, "edge", communicator=Alone(rank, world_size), cache_tokens=64, **options)
    cache, times, feed = model.new_cache(64, 1), [], PROMPT
    sequence = cache.add_sequence()
    for _ in range(tokens):
        began = time.perf_counter()
        logits = model(cache.step([sequence], [len(feed)], feed), cache)
        times.append(time.perf_counter() - began)
        feed = [7] if logits is None else [int(logits[0].argmax())]
    return {"first_s": times[0], "token_s": statistics.median(times[1:]), "times": times} | figures(model)


def figures(model) -> dict:
    """Memory, and the disk by itself: the same pieces through the same window with nobody multiplying, all ranks at once."""
    peak = peak_bytes()
    if model.memory is None:
        return {"peak": peak}
    plan, window, passes = model.memory, model.window, []
    for number in range(2):
        if model.communicator.world_size > 1:
            model.communicator.barrier()
        began = time.perf_counter()
        for index in window.order if plan.read_bytes else ():
            window.take(index)
            window.give_back(index)
        if number:
            passes.append(time.perf_counter() - began)
    return {"peak": peak, "predicted": plan.predicted, "budget": plan.budget, "read_bytes": plan.read_bytes, "disk_s": min(passes),
            "compute_s": plan.compute_s, "reduce_s": plan.reduce_s, "plan_token_s": plan.residency.pass_s, "rates": asdict(plan.rates),
            "ring": plan.residency.ring_bytes, "resident": len(plan.residency.resident), "pieces": plan.pieces,
            "direct": window.reader.direct,
            "waited_s": window.statistics.waited_s}
