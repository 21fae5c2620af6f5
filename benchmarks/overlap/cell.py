"""What every rank of the benchmark does: one random model, one link, one number of tokens; contenders take turns, the slowest rank counts.

A contender is a schedule of the same step; "no comm" is plain with every collective removed. Costs for the simulation and for `auto` are
measured here, once, as `hetero-attn tune --schedule` does. Where the ranks' threads fill the machine, what a sum takes of the processors
(copies, TCP, the emulated link itself) cannot hide: it is measured too, and the simulation gives it to the compute lane.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hetero_attn.collectives import init_communicator
from hetero_attn.collectives.link import slowest
from hetero_attn.models.decoder import sum_norm
from hetero_attn.models.schedule_measure import measure_costs
from hetero_attn.models.schedule_setup import places_of
from hetero_attn.parallel.schedule_choice import Auto, Plain, Schedule, Tiled, Weave
from hetero_attn.parallel.schedule_cost import Costs
from hetero_attn.parallel.schedule_order import COMPUTE, Cut, simulate
from hetero_attn.parallel.trace import Recorder, gather_events, meet
from hetero_attn.profile import load_profile
from overlap.model import Shape, random_decoder, silenced

NO_COMM = "no comm"
COST_ROWS, LONG = (16, 64, 128, 256, 512), 1024      # so many rows too, as `tune` has them, of steps as long: a row costs more there
BUSY_ROWS, BUSY_S = 256, 1.0                         # sums of so many rows, back to back for so long: how busy are the processors?


@dataclass(frozen=True)
class Job:
    """tokens: prompts of these lengths, each a cell; mixed: (decoding sequences, their past, prompt tokens) of cells with both."""

    shape: Shape
    tokens: tuple[int, ...]
    rounds: int
    contenders: tuple[str, ...]
    mixed: tuple[tuple[int, int, int], ...] = ()
    trace: bool = False


def measure(job: Job) -> dict[str, Any]:
    """One rank's part of a job; the same facts on every rank."""
    profile = load_profile("cpu")
    with init_communicator(profile) as communicator:
        decoder = random_decoder(job.shape, communicator, profile)
        began = time.perf_counter()
        costs = measure_costs(decoder, COST_ROWS + (LONG,) * (max(job.tokens, default=0) >= LONG))
        took = time.perf_counter() - began
        busy = _busy(decoder)
        places = places_of(decoder, profile)
        made: dict[str, Schedule] = {
            "plain": Plain(places), NO_COMM: Plain(places), "weave 2": Weave(places, 2, costs),
            "weave 3": Weave(places, 3, costs), "weave 4": Weave(places, 4, costs), "tiled": Tiled(places, None, costs),
            "auto": Auto(places, costs),
        }
        schedules = {name: made[name] for name in job.contenders}
        cells = [_cell(decoder, schedules, costs, busy, [tokens], [tokens], job) for tokens in job.tokens]
        cells += [_cell(decoder, schedules, costs, busy, [1] * decoding + [tokens], [past + 1] * decoding + [tokens], job)
                  for decoding, past, tokens in job.mixed]
        return {"communicator": type(communicator).__name__, "costs": costs.settings(), "pair_ns": costs.pair_s * 1e9,
                "efficiency": costs.efficiency, "further_ms": costs.further_s * 1e3, "busy": busy,
                "costs_in_s": took, "shape": asdict(job.shape), "cells": cells}


def _busy(decoder) -> float:
    """The part of all processors' time that is used while the ranks do nothing but sum, 0 to 1; 0 where the system does not tell, or has
    processors to spare for it."""
    communicator, width = decoder.communicator, decoder.config.hidden_size
    x, residual = torch.randn(BUSY_ROWS, width), torch.randn(len(range(BUSY_ROWS)[communicator.rows(BUSY_ROWS)]), width)
    norm, used = sum_norm(decoder.norm, None).options("bench"), 0.0
    began, before, going = time.perf_counter(), _ticks(), torch.ones(1)
    while going.item():
        communicator.all_reduce_rms_norm(x.to(decoder.dtype), residual.to(decoder.dtype), **norm)
        going[0] = float(communicator.rank == 0 and time.perf_counter() - began < BUSY_S)
        going = communicator.all_reduce(going, site="bench")
    idle, total = (after - first for after, first in zip(_ticks(), before))
    if total and torch.get_num_threads() * communicator.world_size >= (os.cpu_count() or 1):
        used = 1 - idle / total
    return communicator.broadcast(torch.tensor([used], dtype=torch.float64), 0, site="bench").item()


def _ticks() -> tuple[int, int]:
    """(idle, all) ticks of all processors so far."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
    except OSError:
        return 0, 0
    return ticks[3] + ticks[4], sum(ticks)


def _simulated(costs: Costs, busy: float, cut: Cut, counts: list[int], lengths: list[int], layers: int):
    """The Timeline of a cut by the costs; of one that overlaps, with the sums' processor time spread over the compute lane."""
    found = costs.simulated(cut, counts, lengths, layers)
    if not cut.overlaps:
        return found
    seconds, more = costs.of(cut, counts, lengths, layers), 1 + busy * found.communication / found.compute
    return simulate(2 * layers, cut, lambda task: seconds(task) * (more if task.lane == COMPUTE else 1))


def _cell(
    decoder, schedules: dict[str, Schedule], costs: Costs, busy: float, counts: list[int], lengths: list[int], job: Job
) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in schedules}
    cuts, expected = {}, {}
    for name, schedule in schedules.items():
        cut = schedule.cut(counts, lengths)
        cuts[name] = str(cut)
        if cut is not None and name != NO_COMM:
            found = _simulated(costs, busy, cut, counts, lengths, len(decoder.layers))
            expected[name] = found.seconds
            if name == "plain":
                expected[NO_COMM] = found.compute
    for number in range(job.rounds + 1):
        for name in schedules if number % 2 else reversed(schedules):
            seconds = _run(decoder, schedules[name], counts, lengths, silent=name == NO_COMM)
            if number:
                times[name].append(seconds)
    cell = {"counts": counts, "lengths": lengths, "cuts": cuts, "simulated": expected, "seconds": times}
    if job.trace:
        recorder = decoder.recorder = Recorder()
        meet(recorder, decoder.communicator)
        _run(decoder, schedules["auto"], counts, lengths)
        decoder.recorder = None
        cell["trace"] = gather_events(recorder, decoder.communicator)
    return cell


def _run(decoder, schedule: Schedule, counts: list[int], lengths: list[int], *, silent: bool = False) -> float:
    """Seconds of one step, of the slowest rank."""
    communicator = decoder.communicator
    cache = decoder.new_cache(sum(lengths), len(lengths))
    ids = [cache.add_sequence() for _ in lengths]
    past = [(identity, length - count) for identity, count, length in zip(ids, counts, lengths) if length > count]
    if past:
        cache.step([identity for identity, _ in past], [before for _, before in past])
        for pages in (*cache.k, *cache.v):
            pages.normal_()
    tokens = torch.randint(0, decoder.config.vocab_size, (sum(counts),), generator=torch.Generator().manual_seed(0))
    step = cache.step(ids, counts, tokens)
    decoder.schedule = schedule
    communicator.barrier(site="bench")
    began = time.perf_counter()
    if silent:
        with silenced(decoder):
            decoder(step, cache)
    else:
        decoder(step, cache)
    return slowest(communicator, time.perf_counter() - began, site="bench")
