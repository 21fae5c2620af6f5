"""Thousands of calls of changing operations, shapes, sizes and dtypes over shared memory: none hangs, and all ranks hold the same bits.

Every rank draws the same calls from one seed, and keeps a digest of all results that are to be alike; digests are compared as it goes.
Half of the tensors are from Communicator.empty(), few are large. A lost step shows as a time-out that names the operation.
"""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cpu.verdicts import Verdict

from collectives import bars
from collectives.ranks import join
from hetero_attn.communicator import shard_counts
from hetero_attn.parallel.launch import run_ranks

OPERATIONS = ("all_reduce", "all_reduce_rms_norm", "reduce_scatter", "all_gather", "broadcast", "barrier")
WEIGHTS = (6, 5, 2, 2, 2, 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 3, 64, 255, 256, 1000, 4096)
COMPARED = 1000                                      # calls between two comparisons


@dataclass(frozen=True)
class Stress:
    """ranks -> (calls made, of which the ranks' digests were alike, seconds)."""

    runs: dict[int, tuple[int, int, float]]
    wanted: int

    def verdicts(self) -> list[Verdict]:
        return [bars.holds(f"calls of changing shapes, {ranks} ranks", calls >= self.wanted and alike == calls,
                           f"{calls} calls without a hang, {alike} with the same bits on all ranks, required {self.wanted}")
                for ranks, (calls, alike, _) in self.runs.items()]


def measure(calls: int, progress: Callable[[str], None]) -> Stress:
    runs = {}
    for ranks in (2, 4):
        progress(f"stress, {ranks} ranks: {calls} calls")
        runs[ranks] = run_ranks(in_rank, (calls, ranks), ranks, timeout_s=900)[0]
    return Stress(runs, calls)


def in_rank(calls: int, seed: int) -> tuple[int, int, float]:
    """(calls made, calls in stretches whose digests were alike on all ranks, seconds)."""
    draw, alike, digest, began = random.Random(seed), 0, 0, time.perf_counter()
    with join("cpu") as communicator, torch.inference_mode():
        pool = torch.randn(1 << 21, generator=torch.Generator().manual_seed(communicator.rank))
        for number in range(1, calls + 1):
            digest = zlib.crc32(one(communicator, draw, pool), digest)
            if number % COMPARED == 0 or number == calls:
                every = communicator.all_gather(torch.tensor([digest]), sizes=[1] * communicator.world_size).tolist()
                alike += (number - 1) % COMPARED + 1 if len(set(every)) == 1 else 0
    return calls, alike, time.perf_counter() - began


def one(communicator, draw: random.Random, pool: torch.Tensor) -> bytes | memoryview:
    """One call; what of its result is the same on every rank."""
    operation = draw.choices(OPERATIONS, WEIGHTS)[0]
    if operation == "barrier":
        communicator.barrier()
        return b""
    width, dtype = draw.choice(WIDTHS), draw.choice(DTYPES)
    most = (1 << 19) // width if draw.random() < 0.01 else max(1, (1 << 13) // width)
    rows = draw.randint(1, max(1, most))
    at, inside, src = draw.randrange(len(pool) - rows * width), draw.random() < 0.5, draw.randrange(communicator.world_size)
    x = communicator.empty((rows, width), dtype) if inside else torch.empty(rows, width, dtype=dtype)
    x.copy_(pool[at : at + rows * width].view(rows, width))
    if operation == "all_reduce":
        result = communicator.all_reduce(x)
    elif operation == "broadcast":
        result = communicator.broadcast(x, src)
    elif operation == "all_gather":
        result = communicator.all_gather(x, sizes=[rows] * communicator.world_size)
    elif operation == "reduce_scatter":              # a rank's own rows: alike once they are gathered
        result = communicator.all_gather(communicator.reduce_scatter(x), sizes=shard_counts(communicator.world_size, rows))
    else:
        own = communicator.rows(rows)
        shard = torch.ones(own.stop - own.start, width, dtype=dtype)
        result, _ = communicator.all_reduce_rms_norm(x, shard, torch.ones(width, dtype=dtype), 1e-5, site="stress")
    return memoryview(result.contiguous().view(torch.uint8).numpy())
