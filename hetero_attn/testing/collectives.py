"""The conformance suite of communicators: what every one must do, case by case, against a single-process definition in fp64.

    HETERO_ATTN_TEST_COMMUNICATORS=mychip pytest --pyargs hetero_attn.testing

runs it on the communicator of a backend of your own. `check_case` runs in every rank; `run_suite` runs all cases in one set of ranks and
returns a complaint, or None, for each; results that should be the same on all ranks are compared bit by bit.
"""

from __future__ import annotations

import functools
import hashlib
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hetero_attn.communicator import Communicator, CommunicatorError, shard_rows
from hetero_attn.testing.collective_behaviour import BEHAVIOURS
from hetero_attn.testing.collective_cases import CASES, CHANNELS, CollectiveCase, laid_out
from hetero_attn.testing.ranks import Outcome, alone, on_ranks
from hetero_attn.testing.tolerances import mismatch

EPS = 1e-5
OUT_FEATURES = 6
Found = tuple[str | None, str]         # a complaint or None, and the digest of what all ranks share
STARTABLE = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_reduce_rms_norm")


def expected(case: CollectiveCase, rank: int, world_size: int) -> tuple[torch.Tensor, ...]:
    """The results of the call on `rank`, by definition: fp64 (integers as they are) from every rank's rounded inputs."""
    wide = torch.float64 if case.dtype.is_floating_point else case.dtype
    ranks = range(world_size)
    inputs = [case.x(each).to(wide) for each in ranks]
    if case.operation == "all_gather":
        return (torch.cat(inputs, int(case.variant.rstrip("+"))),)
    if case.operation == "broadcast":
        return (inputs[int(case.variant) % world_size],)
    if case.operation == "linear_all_reduce":
        total = sum(inputs[each] @ weight_of(case, each).to(wide).T for each in ranks)
        return (total if case.variant == "no bias" else total + case.values("bias", 0, (OUT_FEATURES,)).to(wide),)
    total = functools.reduce(torch.add, inputs)
    if case.operation == "all_reduce":
        return (total,)
    own = shard_rows(case.shape[0], rank, world_size)
    if case.operation == "reduce_scatter":
        return (total[own],)
    weight, post_weight, offset = norm_weights(case)
    if post_weight is not None:
        total = _norm(total, post_weight.to(wide) + offset)
    residual = case.values("residual", 0, case.shape).to(wide) + total
    return _norm(residual, weight.to(wide) + offset), residual[own]


def _norm(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * factor


def weight_of(case: CollectiveCase, rank: int) -> torch.Tensor:
    return case.values("weight", rank, (OUT_FEATURES, case.shape_of(rank)[-1]))                # [C, K_local]


def norm_weights(case: CollectiveCase) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    post = case.values("post_weight", 0, (CHANNELS,)) if case.variant.endswith("post norm") else None
    return case.values("weight", 0, (CHANNELS,)), post, 1.0 if case.variant.startswith("gemma") else 0.0


def call(communicator: Communicator, case: CollectiveCase, *, started: bool) -> tuple[tuple[torch.Tensor, ...], str | None]:
    """Make the call on fresh inputs; (results, what was written that should not have been)."""
    rank, site, device = communicator.rank, "layers.0.o_proj", communicator.device
    x, memory = laid_out(case.x(rank).to(device), case.layout)
    before = memory.clone()
    run: Callable[..., Any] = getattr(communicator, f"start_{case.operation}" if started else case.operation)
    finish = (lambda handle: handle.wait()) if started else (lambda result: result)
    if case.operation == "all_gather":
        axis = int(case.variant.rstrip("+"))
        sizes = [case.shape_of(each)[axis] for each in range(communicator.world_size)] if started else None
        results = (finish(run(x, axis, sizes=sizes)),)
    elif case.operation == "broadcast":
        results = (finish(run(x, int(case.variant) % communicator.world_size)),)
    elif case.operation == "linear_all_reduce":
        bias = case.values("bias", 0, (OUT_FEATURES,)).to(device)
        given = case.variant == "bias everywhere" or (case.variant == "bias on rank 0" and rank == 0)
        results = (finish(run(x, weight_of(case, rank).to(device), bias if given else None, site=site)),)
    elif case.operation == "all_reduce_rms_norm":
        weight, post_weight, offset = norm_weights(case)
        weight, post_weight = weight.to(device), None if post_weight is None else post_weight.to(device)
        residual, _ = laid_out(case.values("residual", 0, case.shape)[communicator.rows(case.shape[0])].to(device), case.layout)
        results = finish(run(x, residual, weight, EPS, site=site, weight_offset=offset, post_weight=post_weight))
        if results[1].data_ptr() != residual.data_ptr():
            return results, "residual_shard was not updated in place"
    else:
        results = (finish(run(x)),)
    if case.operation == "all_reduce_rms_norm":      # its x is working space
        return results, None
    if case.operation in ("all_reduce", "broadcast"):
        if results[0] is not x:
            return results, "returned another tensor than x"
        outside = torch.ones(memory.shape, dtype=torch.bool, device=device)
        outside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
        return results, None if torch.equal(memory[outside], before[outside]) else "memory around x was written"
    return results, None if torch.equal(memory, before) else "x was written"


def check_case(communicator: Communicator, case: CollectiveCase) -> Found:
    """Run a case in this rank, both forms: (complaint or None, digest of the results that all ranks share)."""
    wanted = expected(case, communicator.rank, communicator.world_size)
    digests = []
    for started in (False, True) if case.operation in STARTABLE else (False,):
        results, complaint = call(communicator, case, started=started)
        results = tuple(result.cpu() for result in results)
        form = "start_" if started else ""
        if complaint:
            return f"{form}{case.operation}: {complaint}", ""
        for index, (actual, want) in enumerate(zip(results, wanted)):
            if actual.dtype != case.dtype:
                return f"{form}{case.operation}: result {index} is {actual.dtype}, expected {case.dtype}", ""
            if case.dtype.is_floating_point:
                # The size of what was added up, which may cancel: N terms near 1, or a norm's output times its weight.
                magnitude = max(communicator.world_size, want.abs().max().item() if want.numel() else 0.0)
                complaint = mismatch(actual, want, case.dtype, magnitude=magnitude)
            elif not torch.equal(actual, want):
                complaint = f"is {actual.tolist()}, expected {want.tolist()}"
            if complaint:
                return f"{form}{case.operation}: result {index} {complaint}", ""
        digests.append([digest(result) for result in results])
    if digests[0] != digests[-1]:
        return f"start_{case.operation} gives other bits than {case.operation}", ""
    return None, "" if case.operation == "reduce_scatter" else digests[0][0]


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def suite_names(cases: Sequence[CollectiveCase] = CASES) -> list[str]:
    """Cases and all behaviours, in the order in which they run."""
    return [*(case.name for case in cases), *BEHAVIOURS]


def whole_suite(communicator: Communicator, cases: Sequence[CollectiveCase] = CASES,
                told: Callable[[str, Found | None], None] = lambda name, found: None) -> dict[str, Found]:
    """Cases and all behaviours in this rank, by name. After a CommunicatorError nothing more can run: the rest fails with it.

    told: hears of each, when it begins (None) and when it has run, so that a rank that is stopped has said how far it was.
    """
    done: dict[str, Found] = {}
    checks: list[tuple[str, Callable[[], Found]]] = [
        (case.name, functools.partial(check_case, communicator, case)) for case in cases
    ]
    checks += [(name, functools.partial(_behaviour, communicator, check)) for name, check in BEHAVIOURS.items()]
    for name, check in checks:
        told(name, None)
        try:
            done[name] = check()
        except CommunicatorError as error:
            told(name, (f"CommunicatorError: {error}", ""))
            return done | {left: (f"CommunicatorError: {error}", "") for left, _ in checks if left not in done}
        except Exception:
            done[name] = traceback.format_exc(), ""
        told(name, done[name])
    return done


def _behaviour(communicator: Communicator, check: Callable[[Communicator], str | None]) -> Found:
    return check(communicator), ""


@functools.cache
def run_suite(communicator: str, world_size: int) -> dict[str, str | None]:
    """Case or behaviour name -> complaint or None, for one communicator in one set of ranks; 'solo' runs in this process.

    Raises RankFailure when a rank dies, and LookupError with the reasons when the communicator cannot be had here.
    """
    outcomes = alone(whole_suite) if communicator == "solo" else on_ranks(whole_suite, (), world_size, communicator=communicator)
    if all(outcome.error == "CommunicatorError" for outcome in outcomes):
        raise LookupError(outcomes[0].text)
    return {name: verdict(name, outcomes) for name in suite_names()}


def verdict(name: str, outcomes: list[Outcome]) -> str | None:
    """What the ranks say about one case, together: the first complaint, or that their bits differ."""
    for rank, outcome in enumerate(outcomes):
        if outcome.error:
            return f"rank {rank}: {outcome.traceback}"
    return together([outcome.result[name] for outcome in outcomes])


def together(found: list[Found]) -> str | None:
    """The same of what each rank found, in rank order."""
    for rank, (complaint, _) in enumerate(found):
        if complaint:
            return f"rank {rank}: {complaint}"
    digests = {rank: own for rank, (_, own) in enumerate(found)}
    return None if len(set(digests.values())) == 1 else f"the ranks' bits differ: {digests}"
