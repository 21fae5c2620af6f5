"""Ranks on a machine with one GPU: a fused communicator's twin without multicast, a world of one, and a group of a GPU and a CPU rank.

Every rank makes every rank's inputs from a seed, so each compares its own results with the definition in fp64. Two processes on one GPU
are allowed by TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES; NCCL refuses them, so torch.distributed's part of the group is gloo.
"""

from __future__ import annotations

import dataclasses
import itertools
import os

import torch

from hetero_attn import registry
from hetero_attn.collectives import init_communicator
from hetero_attn.communicator import Communicator, shard_rows
from hetero_attn.norm import rms_norm
from hetero_attn.parallel.launch import RankFailure, run_ranks
from hetero_attn.profile import load_profile
from hetero_attn.testing.gpu.clock import medians
from hetero_attn.testing.gpu.outcome import FAILED, PASSED, Outcome, skipped
from hetero_attn.testing.tolerances import mismatch

OVERLAPPING = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
SITE, EPS, TIMEOUT_S, LIMIT_S = "layers.0.o_proj", 1e-5, 30.0, 240.0
ROWS, WIDTHS = (1, 2, 7, 64, 333), (64, 4096, 8192)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Group:
    """Ranks and where they live: rank r on devices[r], with the communicator of that name; a lone rank has SoloCommunicator."""

    name: str
    communicator: str
    devices: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}, {self.communicator} on {' and '.join(self.devices)}"


def groups_of(device: torch.device, twin: str = "hopper") -> tuple[Group, ...]:
    """What one GPU allows: two ranks on it by backend `twin`'s communicator, one alone, and one beside a CPU's, over gloo."""
    own = str(device)
    return Group("twin", twin, (own, own)), Group("alone", "solo", (own,)), Group("mixed", "distributed", (own, "cpu"))


def objections(group: Group) -> list[str]:
    """Why a group cannot be had on this machine; [] = it can be tried."""
    if group.communicator in ("solo", "distributed"):
        return []
    if group.communicator not in registry.names():
        return [f"there is no backend {group.communicator!r} here; known are {', '.join(registry.names())}"]
    return registry.communicator_unavailable(registry.get(group.communicator))


def joined(group: Group) -> Communicator:
    """In a rank: the group's communicator and no other. Raises CommunicatorError with the reasons against it."""
    device = torch.device(group.devices[int(os.environ["RANK"])])
    known = load_profile("cpu" if device.type == "cpu" else None)
    names = known.communicators if group.communicator == "solo" else (group.communicator,)
    return init_communicator(dataclasses.replace(known, communicators=names), timeout_s=TIMEOUT_S, device=device)


def values(name: str, rank: int, *shape: int) -> torch.Tensor:
    """fp32 numbers that every rank can make for any other."""
    seed = sum(ord(letter) for letter in name) * 1009 + rank
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def complaints(communicator: Communicator, device: torch.device, rows=ROWS, widths=WIDTHS, dtypes=DTYPES) -> list[str]:
    """All-reduce and the fused norm on this rank, over rows, widths and dtypes, from buffers of the communicator: what is wrong."""
    wrong = []
    world, rank = communicator.world_size, communicator.rank
    for T, C, dtype in itertools.product(rows, widths, dtypes):
        inputs = [values(f"x {T} {C}", each, T, C).to(dtype) for each in range(world)]
        total = sum(each.double() for each in inputs)                                                # [T, C]
        weight, own = values("weight", 0, C).to(dtype), shard_rows(T, rank, world)
        residual = values(f"residual {T} {C}", 0, T, C).to(dtype)
        wanted = residual.double() + total
        normed = wanted / (wanted.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
        x = communicator.empty((T, C), dtype)
        x.copy_(inputs[rank])
        found = communicator.all_reduce(x, site=SITE).cpu()
        text = mismatch(found, total, dtype, magnitude=2.0 * world)
        wrong.append(text and f"all_reduce {T} x {C} {dtype}: {text}")
        x = communicator.empty((T, C), dtype)
        x.copy_(inputs[rank])
        shard = residual[own].to(device)
        got, left = communicator.all_reduce_rms_norm(x, shard, weight.to(device), EPS, site=SITE)
        size = max(2.0 * world, normed.abs().max().item())
        for what, one, other in (("norm", got.cpu(), normed), ("residual", left.cpu(), wanted[own])):
            text = mismatch(one, other, dtype, magnitude=size)
            wrong.append(text and f"all_reduce_rms_norm {T} x {C} {dtype}: {what}: {text}")
    return [line for line in wrong if line]


def in_rank(group: Group, widths: tuple[int, ...]) -> tuple[str, list[str]]:
    """One rank of a group: (what serves, complaints)."""
    with joined(group) as communicator:
        return type(communicator).__name__, complaints(communicator, communicator.device, widths=widths)


def twin(device: torch.device, name: str = "hopper") -> Outcome:
    """Two processes on one GPU by the communicator of backend `name`: without multicast it must serve, and right."""
    return _ranks(groups_of(device, name)[0], WIDTHS)


def alone(device: torch.device) -> Outcome:
    """A world of one on the device."""
    return _ranks(groups_of(device)[1], WIDTHS[:2])


def mixed(device: torch.device) -> Outcome:
    """A tensor-parallel group of one GPU rank and one CPU rank, over gloo."""
    return _ranks(groups_of(device)[2], WIDTHS[:2])


def _ranks(group: Group, widths: tuple[int, ...]) -> Outcome:
    if reasons := objections(group):
        return skipped(f"{group}: {'; '.join(reasons)}")
    try:
        found = run_ranks(in_rank, (group, widths), len(group.devices), timeout_s=LIMIT_S, env=OVERLAPPING)
    except RankFailure as failure:
        return Outcome(FAILED, f"{group}: {failure}")
    wrong = [f"rank {rank}: {line}" for rank, (_, lines) in enumerate(found) for line in lines]
    text = f"{found[0][0]} on {', '.join(group.devices)}, {len(ROWS) * len(widths) * len(DTYPES)} shapes and dtypes"
    return Outcome(FAILED if wrong else PASSED, text + "".join(f"\n{line}" for line in wrong[:8]))


def timed_rank(group: Group, tokens: tuple[int, ...], hidden: int, rounds: int) -> tuple[str, list[dict]]:
    """One rank: (what serves, for each T of tokens the medians of its fused norm, and of an add and a norm without any exchange)."""
    with joined(group) as communicator:
        device, found = communicator.device, []
        for T in tokens:
            x = communicator.empty((T, hidden), torch.bfloat16)
            x.zero_()
            weight = torch.ones(hidden, dtype=torch.bfloat16, device=device)
            whole = torch.randn(T, hidden, device=device).to(torch.bfloat16)
            shard = whole[shard_rows(T, communicator.rank, communicator.world_size)].clone()
            found.append(medians({
                "fused": lambda x=x, shard=shard, weight=weight: communicator.all_reduce_rms_norm(x, shard, weight, EPS, site=SITE),
                "apart": lambda x=x, whole=whole, weight=weight: rms_norm(whole.add_(x), weight, EPS),
            }, device, rounds, behind=False))
        return type(communicator).__name__, found


def fused(device: torch.device, name: str = "hopper", quick: bool = False) -> Outcome:
    """Microseconds of the fused all-reduce and norm by backend `name`'s communicator, alone and as a pair on this device, beside a residual
    add and a norm that exchange nothing: what the exchange costs on top. No bar: a pair on one GPU shares its memory and its units."""
    pair = groups_of(device, name)[0]
    if reasons := objections(pair):
        return skipped(f"{pair}: {'; '.join(reasons)}")
    tokens, hidden, rounds = ((64, 1024, 4096), 8192, 10 if quick else 40) if device.type == "cuda" else ((16,), 64, 3)
    table, wrong = [("ranks", "serves", "tokens", "fused, us", "add and norm, us")], []
    for ranks in (1, 2):
        try:
            group = dataclasses.replace(pair, devices=pair.devices[:ranks])
            serves, found = run_ranks(timed_rank, (group, tokens, hidden, rounds), ranks, timeout_s=LIMIT_S, env=OVERLAPPING)[0]
        except RankFailure as failure:
            wrong.append(f"{ranks} ranks: {failure}")
            continue
        for T, times in zip(tokens, found):
            told = (f"{1e6 * each:.1f}" if isinstance(each, float) else each for each in times.values())
            table.append((str(ranks), serves, str(T), *told))
            wrong += [f"{ranks} ranks, {T} tokens, {what}: {each}" for what, each in times.items() if isinstance(each, str)]
    return Outcome(FAILED if wrong else PASSED, "\n".join([f"hidden {hidden}, bf16, medians of {rounds}, with the host", *wrong]),
                   table=tuple(table))
