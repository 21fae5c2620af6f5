"""Ranks of one host over shared memory, beside gloo in the same rounds: the plain all-reduce, and the fused one with add and norm.

Ours is called from Python; `in place` means an x from Communicator.empty(). Where nobody writes x between two calls, a rank finds its slice
of everybody's x in its own cache: `x written anew` copies into it first, as a linear would write, and that time counts. What the fused call
gives is compared with its parts, and all ranks' bits with one another; a profile that leaves the codec to the communicator sends none here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cpu.verdicts import Verdict

from collectives import bars, openmpi
from collectives.ranks import join, slowest, take_turns
from hetero_attn.communicator import add_and_norm
from hetero_attn.parallel.launch import run_ranks

HIDDEN, EPS = 4096, 1e-6
TOKENS = tuple(bars.FUSED_TIMES)
RANKS = tuple(bars.SMALL_S)


@dataclass(frozen=True)
class OneHost:
    """plain[ranks][bytes][contender], fused[tokens][contender]: seconds of a call. facts: how results compare. openmpi: as plain, of this
    machine, or the reason why it was not run."""

    plain: dict[int, dict[int, dict[str, float]]]
    fused: dict[int, dict[str, float]]
    largest_error: float
    same_bits: bool
    auto_is_exact: bool
    openmpi: dict[int, dict[int, float]]
    openmpi_reason: str

    def verdicts(self) -> list[Verdict]:
        lines = [bars.at_least(f"fused all-reduce + RMSNorm, {tokens} tokens, over gloo + add + norm: {how}", times["gloo"] / times[name],
                               bars.FUSED_TIMES[tokens])
                 for name, how in (("fused", "x in shared memory"), ("fused, x written anew", "x copied there first, the copy counts"))
                 for tokens, times in self.fused.items()]
        lines += [bars.at_most(f"all_reduce of 8 KiB from Python, {ranks} ranks", self.plain[ranks][bars.SIZES[0]]["ours"],
                               bars.SMALL_S[ranks]) for ranks in self.plain]
        bar = bars.OPENMPI_S[2][bars.SIZES[-1]][1]
        lines.append(bars.at_most("all_reduce of 16 MiB, 2 ranks (OpenMPI's published time)", self.plain[2][bars.SIZES[-1]]["ours"], bar))
        lines.append(bars.holds("fused = unfused to fp32 rounding", self.largest_error <= bars.FP32_ROUNDING,
                                f"largest difference {self.largest_error:.2g} of values about 1, required <= {bars.FP32_ROUNDING:g}"))
        lines.append(bars.holds("fused, the same bits on every rank", self.same_bits, "every shape" if self.same_bits else "ranks differ"))
        lines.append(bars.holds("shared memory, codec: auto", self.auto_is_exact,
                                "uncompressed: no value went through a codec, sums exact" if self.auto_is_exact else "NOT uncompressed"))
        return lines


def measure(seconds: float, progress: Callable[[str], None]) -> OneHost:
    """seconds: for each size or number of tokens."""
    plain, found_openmpi, reasons = {}, {}, {}
    for ranks in RANKS:
        progress(f"one host, {ranks} ranks: all_reduce of {', '.join(map(bars.size, bars.SIZES))}, ours beside gloo")
        plain[ranks] = run_ranks(plain_in_rank, (seconds,), ranks, timeout_s=300)[0]
        progress(f"one host, {ranks} ranks: OpenMPI")
        found_openmpi[ranks], reasons[ranks] = openmpi.measure(ranks, bars.SIZES, seconds)
    progress("one host, 2 ranks: fused all-reduce + RMSNorm beside gloo + add + norm")
    fused, largest_error, same_bits, exact = run_ranks(fused_in_rank, (seconds,), 2, timeout_s=300)[0]
    return OneHost(plain, fused, largest_error, same_bits, exact, found_openmpi,
                   "; ".join(f"{ranks} ranks: {reason}" for ranks, reason in reasons.items() if reason))


def plain_in_rank(seconds: float) -> dict[int, dict[str, float]]:
    """bytes -> contender -> seconds of an all_reduce of fp32."""
    found = {}
    with join("cpu") as communicator:
        for nbytes in bars.SIZES:
            private, inside = torch.zeros(nbytes // 4), communicator.empty((nbytes // 4,), torch.float32).zero_()
            communicator.all_reduce(inside)          # the heap grows in a collective
            inside = communicator.empty((nbytes // 4,), torch.float32).zero_()
            gloos = torch.zeros(nbytes // 4)
            found[nbytes] = take_turns(communicator, {
                "ours": lambda x=private: communicator.all_reduce(x), "ours, in place": lambda x=inside: communicator.all_reduce(x),
                "gloo": lambda x=gloos: dist.all_reduce(x),
            }, seconds)
    return found


def fused_in_rank(seconds: float) -> tuple[dict[int, dict[str, float]], float, bool, bool]:
    """(tokens -> contender -> seconds, largest |fused - unfused|, same bits on all ranks, codec: auto left sums exact)."""
    found, worst, same = {}, 0.0, True
    with join("cpu", codec="auto") as communicator, torch.inference_mode():
        weight = torch.linspace(0.5, 1.5, HIDDEN)
        for tokens in TOKENS:
            x = communicator.empty((tokens, HIDDEN), torch.float32)
            generator = torch.Generator().manual_seed(communicator.rank)
            x.copy_(torch.randn(tokens, HIDDEN, generator=generator))
            own = communicator.rows(tokens)
            residual = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(99))
            total = communicator.all_reduce(x.clone())
            unfused = add_and_norm(total, residual.clone(), weight, EPS)
            fused, _ = communicator.all_reduce_rms_norm(x.clone(), residual[own].clone(), weight, EPS, site="bench")
            worst = max(worst, slowest(communicator, (fused - unfused).abs().max().item()))
            every = communicator.all_gather(fused.contiguous().view(1, tokens, HIDDEN), sizes=[1] * communicator.world_size)
            same &= all(torch.equal(every[0].view(torch.int32), each.view(torch.int32)) for each in every)
            shard, whole, summand = residual[own].clone(), residual.clone(), torch.zeros(tokens, HIDDEN)
            private, source = torch.zeros(tokens, HIDDEN), x.clone()

            def by_gloo(summand=summand, whole=whole) -> torch.Tensor:
                dist.all_reduce(summand)
                return F.rms_norm(whole.add_(summand), (HIDDEN,), weight, EPS)

            def by_us(x: torch.Tensor, shard=shard) -> torch.Tensor:
                return communicator.all_reduce_rms_norm(x, shard, weight, EPS, site="bench")[0]

            found[tokens] = take_turns(communicator, {
                "fused": lambda x=x, by_us=by_us: by_us(x), "fused, private x": lambda x=private, by_us=by_us: by_us(x),
                "fused, x written anew": lambda x=x, source=source, by_us=by_us: by_us(x.copy_(source)), "gloo": by_gloo,
            }, seconds)
        exact = auto_is_exact(communicator)
    return found, worst, bool(same), exact


def auto_is_exact(communicator) -> bool:
    """Whether a prefill's sum under codec: auto is the sum of the summands, and nothing was encoded."""
    def summand(rank: int) -> torch.Tensor:
        return torch.randn(512, HIDDEN, generator=torch.Generator().manual_seed(rank)).bfloat16()

    exact = sum(summand(rank).float() for rank in range(communicator.world_size)).bfloat16()
    found = communicator.all_reduce(summand(communicator.rank), site="layers.0.down_proj")
    coded = communicator.base.codecs.traffic.total().values
    return bool(slowest(communicator, float(not torch.equal(found, exact) or coded > 0)) == 0)
