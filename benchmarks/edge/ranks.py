"""What each rank of the benchmark does: load within a budget, generate, and time its disk alone, reading just what a token reads."""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch

from edge import throttle
from hetero_attn.communicator import Communicator
from hetero_attn.models.budget import peak_bytes
from hetero_attn.models.control import Driver, serve
from hetero_attn.models.load import load_model
from hetero_attn.models.shard_folder import folder_name

PROMPT = [3, 14, 15, 92, 65, 35]


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


def generate(folder: str, options: dict, tokens: int, rounds: int = 1, mbytes_s: float | None = None) -> dict:
    """A rank of a real group; token times on rank 0, memory and disk figures on all. mbytes_s: of a disk of this rank's own.

    Each round is a prompt and its tokens, then a pass of reading alone: disks change their mind from minute to minute.
    """
    with throttle.limited(folder, mbytes_s):
        model = load_model(folder, "edge", cache_tokens=64, **options)
        first, times, passes, found = [], [], [], {}
        for _ in range(rounds):
            if model.communicator.rank == 0:
                seconds, chosen, rows = greedy(model, tokens)
                first, times, found = [*first, seconds[0]], [*times, *seconds[1:]], {"tokens": chosen, "logits": rows}
            else:
                serve(model)
            if model.memory is not None:
                passes.append(read_alone(model))
        if times or first:
            found |= {"first_s": statistics.median(first), "token_s": statistics.median(times or first), "times": times}
        return found | figures(model, passes)


def greedy(model, tokens: int, prompt: list[int] = PROMPT) -> tuple[list[float], list[int], list[str]]:
    """Rank 0's part: seconds of each token, the tokens, and the sha256 of each one's whole row of logits."""
    times, chosen, rows, feed = [], [], [], prompt
    with Driver(model) as driver:
        driver.new_cache(len(prompt) + 58, 1)
        sequence = driver.add_sequence()
        for _ in range(tokens):
            began = time.perf_counter()
            logits = driver.forward([sequence], [len(feed)], feed)
            times.append(time.perf_counter() - began)
            rows.append(hashlib.sha256(logits[0].contiguous().cpu().view(torch.uint8).numpy()).hexdigest())
            feed = [int(logits[0].argmax())]
            chosen += feed
    return times, chosen, rows


def alone(folder: str, rank: int, world_size: int, options: dict, tokens: int) -> dict:
    """One rank by itself, of a group that this host could not hold or would take too long to run."""
    os.environ.pop("RANK", None)
    own = Path(folder) / folder_name(rank, world_size)
    model = load_model(own, "edge", communicator=Alone(rank, world_size), cache_tokens=64, **options)
    cache, times, passes, feed = model.new_cache(64, 1), [], [], PROMPT
    sequence = cache.add_sequence()
    for number in range(tokens):
        began = time.perf_counter()
        logits = model(cache.step([sequence], [len(feed)], feed), cache)
        times.append(time.perf_counter() - began)
        feed = [7] if logits is None else [int(logits[0].argmax())]
        if number:
            passes.append(read_alone(model))
    return {"first_s": times[0], "token_s": statistics.median(times[1:]), "times": times[1:]} | figures(model, passes)


def read_alone(model) -> float:
    """Seconds of a pass of the same pieces through the same window with nobody multiplying, all ranks at once."""
    window = model.window
    if model.communicator.world_size > 1:
        model.communicator.barrier()
    began = time.perf_counter()
    for index in window.order:
        window.take(index)
        window.give_back(index)
    return time.perf_counter() - began


def figures(model, passes: list[float]) -> dict:
    """Memory, what the plan said, and the disk by itself."""
    peak = peak_bytes()
    if model.memory is None:
        return {"peak": peak}
    plan, window = model.memory, model.window
    return {"peak": peak, "predicted": plan.predicted, "budget": plan.budget, "read_bytes": plan.read_bytes,
            "disk_s": statistics.median(passes), "passes": passes, "compute_s": plan.compute_s, "reduce_s": plan.reduce_s,
            "plan_token_s": plan.residency.pass_s, "rates": asdict(plan.rates), "ring": plan.residency.ring_bytes,
            "resident": len(plan.residency.resident), "pieces": plan.pieces, "direct": window.reader.direct,
            "waited_s": window.statistics.waited_s}
