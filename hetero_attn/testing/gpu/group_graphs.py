"""Collectives in CUDA graphs: each is captured once on every rank and replayed on inputs that change, beside plain calls of the same.

A replay must give a plain call's bits, and both what the definition in fp64 gives. Plain calls stand between the replays, because the
ranks' meetings are counted in device memory and a replay counts on. A sum that is started is captured with its wait, side stream and all.
What is staged through host memory (a CPU rank in the group) cannot be captured, and is left out with that reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hetero_attn.communicator import Communicator, CommunicatorError, shard_counts, shard_rows
from hetero_attn.parallel.launch import RankFailure, run_ranks
from hetero_attn.testing.gpu.graph_seam import Seam, seam_of
from hetero_attn.testing.gpu.group_suite import described
from hetero_attn.testing.gpu.groups import EPS, OVERLAPPING, SITE, Group, groups_of, objections, values
from hetero_attn.testing.gpu.groups import joined as join
from hetero_attn.testing.gpu.outcome import FAILED, PASSED, SKIPPED, Outcome
from hetero_attn.testing.tolerances import mismatch

TURNS = 4


@dataclass(frozen=True)
class Exchange:
    """One captured call. x is [rows, width]; an all-gather's is a rank's share of the rows."""

    operation: str
    rows: int
    width: int
    dtype: torch.dtype = torch.bfloat16
    started: bool = False

    def __str__(self) -> str:
        return f"{'start_' if self.started else ''}{self.operation} of {self.rows} x {self.width} {str(self.dtype).removeprefix('torch.')}"

    def x(self, rank: int, world: int, turn: int) -> torch.Tensor:
        """A rank's x of a turn, on the CPU."""
        rows = shard_counts(world, self.rows)[rank] if self.operation == "all_gather" else self.rows
        return values(f"{self} {turn}", rank, rows, self.width).to(self.dtype)

    def residual(self, turn: int) -> torch.Tensor:
        return values(f"residual {self} {turn}", 0, self.rows, self.width).to(self.dtype)

    @property
    def weight(self) -> torch.Tensor:
        return values("weight", 0, self.width).to(self.dtype)

    def wanted(self, rank: int, world: int, turn: int) -> tuple[torch.Tensor, ...]:
        """The results on a rank by definition, fp64."""
        inputs = [self.x(each, world, turn).double() for each in range(world)]
        if self.operation == "all_gather":
            return (torch.cat(inputs),)
        total, own = sum(inputs), shard_rows(self.rows, rank, world)
        if self.operation == "all_reduce":
            return (total,)
        if self.operation == "reduce_scatter":
            return (total[own],)
        total = total + self.residual(turn).double()
        return total / (total.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * self.weight.double(), total[own]


EXCHANGES = (                          # one exchange of everything, and in two halves; ragged shards; what a decoder's layer makes
    Exchange("all_reduce", 1, 4096), Exchange("all_reduce", 333, 4096), Exchange("all_reduce", 7, 64, torch.float32),
    Exchange("reduce_scatter", 33, 4096), Exchange("all_gather", 33, 4096), Exchange("all_reduce_rms_norm", 1, 8192),
    Exchange("all_reduce_rms_norm", 65, 8192), Exchange("all_reduce_rms_norm", 7, 64, torch.float16),
    Exchange("all_reduce", 64, 4096, started=True), Exchange("all_reduce_rms_norm", 64, 4096, started=True),
)
REHEARSAL = (
    Exchange("all_reduce", 3, 64), Exchange("reduce_scatter", 5, 64), Exchange("all_gather", 5, 64), Exchange("all_reduce_rms_norm", 5, 64),
    Exchange("all_reduce_rms_norm", 4, 64, started=True),
)


class Prepared:
    """An exchange on one rank: tensors that stay where they are, and the call that reads them and writes none of them."""

    def __init__(self, communicator: Communicator, exchange: Exchange) -> None:
        self._communicator, self._exchange = communicator, exchange
        self._rank, self._world, device = communicator.rank, communicator.world_size, communicator.device
        self._x = exchange.x(self._rank, self._world, 0).to(device)
        self._own = shard_rows(exchange.rows, self._rank, self._world)
        self._residual = exchange.residual(0)[self._own].to(device)
        self._weight = exchange.weight.to(device)
        self._sizes = shard_counts(self._world, exchange.rows)

    def fill(self, turn: int) -> None:
        self._x.copy_(self._exchange.x(self._rank, self._world, turn))
        self._residual.copy_(self._exchange.residual(turn)[self._own])

    def call(self) -> tuple[torch.Tensor, ...]:
        """From buffers of the communicator, as a decoder's products fill them."""
        communicator, operation = self._communicator, self._exchange.operation
        buffer = communicator.empty(tuple(self._x.shape), self._x.dtype)
        buffer.copy_(self._x)
        arguments, options = (buffer,), {"site": SITE}
        if operation == "all_gather":
            options["sizes"] = self._sizes
        elif operation == "all_reduce_rms_norm":
            arguments = (buffer, self._residual.clone(), self._weight, EPS)
        if self._exchange.started:
            result = communicator.start(operation, *arguments, **options).wait()
        else:
            result = getattr(communicator, operation)(*arguments, **options)
        return result if isinstance(result, tuple) else (result,)

    def wanted(self, turn: int) -> tuple[torch.Tensor, ...]:
        return self._exchange.wanted(self._rank, self._world, turn)


def replayed(communicator: Communicator, exchange: Exchange, seam: Seam, turns: int = TURNS) -> str | None:
    """What is wrong with an exchange in a graph on this rank, None = nothing. Raises CommunicatorError. All ranks call it together, and
    make as many calls whatever one of them finds."""
    made, trouble, results, replay = Prepared(communicator, exchange), None, (), None
    try:
        results, replay = seam.captured(made.call)
    except CommunicatorError:
        raise
    except Exception as error:
        trouble = f"the capture failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    fine = communicator.all_gather(torch.tensor([trouble is None], device="cpu"), sizes=[1] * communicator.world_size)
    if not fine.all():
        return trouble or f"rank {', '.join(str(rank) for rank, own in enumerate(fine.tolist()) if not own)} could not capture it"
    for turn in range(1, turns + 1):
        made.fill(turn)
        replay()
        found = [each.cpu().clone() for each in results]
        plain = [each.cpu() for each in made.call()]
        for index, (one, other, want) in enumerate(zip(found, plain, made.wanted(turn))):
            size = max(2.0 * communicator.world_size, want.abs().max().item() if want.numel() else 0.0)
            if wrong := mismatch(other, want, exchange.dtype, magnitude=size):
                trouble = trouble or f"a plain call, turn {turn}, result {index}: {wrong}"
            if not torch.equal(one, other):
                trouble = trouble or f"replay {turn}, result {index}: other bits than a plain call's, off by up to {_off(one, other)}"
    return trouble


def _off(one: torch.Tensor, other: torch.Tensor) -> str:
    return f"{(one.double() - other.double()).abs().max().item():.3g}"


def all_replayed(communicator: Communicator, exchanges: Sequence[Exchange], seam: Seam) -> list[tuple[str, str | None]]:
    """(exchange, what is wrong) in order; after a CommunicatorError nothing more runs."""
    found: list[tuple[str, str | None]] = []
    for exchange in exchanges:
        try:
            found.append((str(exchange), replayed(communicator, exchange, seam)))
        except CommunicatorError as error:
            return [*found, (str(exchange), f"CommunicatorError: {error}")]
    return found


def in_rank(group: Group, exchanges: tuple[Exchange, ...], seam_for: Callable[[torch.device], Seam]) -> tuple[str, list]:
    """One rank's part: (what serves and how it was captured, all_replayed)."""
    with join(group) as communicator:
        seam = seam_for(communicator.device)
        return f"{described(communicator)}, {seam.words}", all_replayed(communicator, exchanges, seam)


def replays_on(group: Group, exchanges: tuple[Exchange, ...], limit_s: float, seam_for=seam_of) -> tuple[str, list[str]]:
    """One group: (status, lines)."""
    if reasons := objections(group):
        return SKIPPED, [f"{group}: {'; '.join(reasons)}"]
    try:
        found = run_ranks(in_rank, (group, exchanges, seam_for), len(group.devices), timeout_s=limit_s, env=OVERLAPPING)
    except RankFailure as failure:
        return FAILED, [f"{group}: {failure}"]
    right = sum(all(len(own) > place and own[place][1] is None for _, own in found) for place in range(len(exchanges)))
    lines = [f"{group}: {found[0][0]}: {right} of {len(exchanges)} exchanges, {TURNS} replays each, are as plain calls"]
    lines += [f"  {name}: rank {rank}: {wrong}"[:400] for rank, (_, own) in enumerate(found) for name, wrong in own if wrong]
    return PASSED if right == len(exchanges) else FAILED, lines


def replays(device: torch.device, limit_s: float, twin: str = "hopper") -> Outcome:
    """The twin and a world of one, one after the other, each within its share of the time."""
    began, status, lines = time.monotonic(), SKIPPED, []
    *wanted, mixed = groups_of(device, twin)
    exchanges = EXCHANGES if device.type == "cuda" else REHEARSAL
    for place, group in enumerate(wanted):
        share_s = (limit_s - (time.monotonic() - began)) / (len(wanted) - place)
        verdict, said = replays_on(group, exchanges, max(share_s, 1.0))
        lines += said
        status = FAILED if FAILED in (verdict, status) else PASSED if PASSED in (verdict, status) else SKIPPED
    return Outcome(status, "\n".join([*lines, f"{mixed}: not captured: it is staged through host memory"]))
