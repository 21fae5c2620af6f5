"""What a communicator must do beyond single results: many operations in flight, shapes that change, misuse that is refused in words.

Each check runs in every rank with the same communicator, one after the other, and returns a complaint or None; after each the
communicator must still work, also after calls that were refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.norm import rms_norm


def _ranks(communicator: Communicator) -> range:
    return range(communicator.world_size)


def _made_on(communicator: Communicator) -> SimpleNamespace:
    """torch's makers of tensors, on the communicator's device: one that wraps another leaves CPU tensors to it, and would not be tested."""
    makers = (torch.ones, torch.zeros, torch.full, torch.arange, torch.tensor, torch.linspace)
    return SimpleNamespace(**{make.__name__: functools.partial(make, device=communicator.device) for make in makers})


def rows_cover_every_token(communicator: Communicator) -> str | None:
    """rows(T) of all ranks are contiguous, in rank order, complete, and differ by one row at most."""
    for total in (0, 1, 2, 5, 64, 65):
        mine = communicator.rows(total)
        counts = communicator.row_counts(total)
        if sum(counts) != total or max(counts) - min(counts) > 1 or sorted(counts, reverse=True) != counts:
            return f"row_counts({total}) is {counts}"
        if (mine.start, mine.stop) != (sum(counts[: communicator.rank]), sum(counts[: communicator.rank + 1])):
            return f"rows({total}) is {mine}, row_counts {counts}"
    return None


def empty_gives_a_usable_buffer(communicator: Communicator) -> str | None:
    for shape in ((3, 4), (0, 4), ()):
        buffer = communicator.empty(shape, torch.float32)
        if buffer.shape != shape or buffer.dtype != torch.float32 or not buffer.is_contiguous():
            return f"empty({shape}) is {list(buffer.shape)} {buffer.dtype}"
        buffer.fill_(communicator.rank + 1)
        if communicator.all_reduce(buffer) is not buffer or (buffer != sum(rank + 1 for rank in _ranks(communicator))).any():
            return f"all_reduce of an empty({shape}) buffer is {buffer.tolist()}"
    return None


def many_in_flight(communicator: Communicator) -> str | None:
    """Twenty operations of all kinds in flight, waited for in the reverse order, some twice."""
    make = _made_on(communicator)
    world, rank = communicator.world_size, communicator.rank
    total = sum(_ranks(communicator))
    handles = []
    for turn in range(4):
        rows = 3 + turn
        summed = communicator.start_all_reduce(make.full((rows, 2), rank + turn))
        handles.append((summed, lambda r, t=turn: (r == total + world * t).all()))
        half = make.full((rows,), rank + 1, dtype=torch.bfloat16)
        handles.append((communicator.start_all_reduce(half), lambda r: (r == total + world).all()))
        handles.append((communicator.start_all_gather(make.full((rank, 2), turn)), lambda r, t=turn: len(r) == total and (r == t).all()))
        handles.append((communicator.start_broadcast(make.tensor([rank + turn]), world - 1), lambda r, t=turn: r.item() == world - 1 + t))
        scattered = communicator.start_reduce_scatter(make.arange(rows).repeat(2, 1).T.contiguous())
        mine = communicator.rows(rows)
        handles.append((scattered, lambda r, m=mine, n=rows: torch.equal(r[:, 0], world * make.arange(n)[m])))
    for index in reversed(range(len(handles))):
        handle, right = handles[index]
        result = handle.wait()
        if not right(result):
            return f"operation {index} of {len(handles)} in flight gives {result}"
        if handle.wait() is not result:
            return f"a second wait() for operation {index} gives another result"
    return None


def linear_and_barrier_in_flight(communicator: Communicator) -> str | None:
    """The asynchronous row-parallel linear gives the synchronous one's bits, with barriers started in between."""
    make = _made_on(communicator)
    x = make.arange(15.0).view(5, 3) + communicator.rank                    # [T, K]
    weight, bias = make.arange(12.0).view(4, 3) - communicator.rank, make.ones(4)
    handles = []
    for _ in range(4):
        handles.append(communicator.start_linear_all_reduce(x, weight, bias, site="a"))
        communicator.start_barrier(site="a").wait()
    expected = communicator.linear_all_reduce(x, weight, bias, site="a")
    if not all(torch.equal(handle.wait(), expected) for handle in handles):
        return f"start_linear_all_reduce gave {handles[0].wait().tolist()}, linear_all_reduce {expected.tolist()}"
    return None


def synchronous_after_started(communicator: Communicator) -> str | None:
    """A synchronous call may be made while others are in flight; all ranks issue in program order."""
    make = _made_on(communicator)
    for turn in range(10):
        half = communicator.start_all_reduce(make.ones(1000, dtype=torch.bfloat16))
        norm = communicator.start_all_reduce_rms_norm(
            make.ones(4, 8), make.zeros(communicator.row_counts(4)[communicator.rank], 8), make.ones(8), 1e-5, site="a"
        )
        now = communicator.all_reduce(make.full((3,), float(turn)))
        if (now != turn * communicator.world_size).any() or (half.wait() != communicator.world_size).any():
            return f"turn {turn}: {now.tolist()}"
        if (norm.wait()[0] - 1).abs().max() > 1e-4:
            return f"turn {turn}: norm {norm.wait()[0]}"
    return None


def handles_may_be_dropped(communicator: Communicator) -> str | None:
    make = _made_on(communicator)
    for _ in range(5):
        communicator.start_all_reduce(make.ones(100))
        communicator.start_all_reduce(make.ones(100, dtype=torch.float16))
        communicator.start_all_gather(make.ones(3))
    for _ in range(3):
        communicator.start_all_reduce(make.ones(1 << 19))               # long enough to travel in several messages
    result = communicator.all_reduce(make.ones(2))
    return None if (result == communicator.world_size).all() else f"all_reduce after dropped handles is {result.tolist()}"


def shapes_change_from_call_to_call(communicator: Communicator) -> str | None:
    make = _made_on(communicator)
    generator = torch.Generator().manual_seed(7)                                              # the same on every rank
    for turn in range(60):
        shape = torch.randint(0, 40, (2,), generator=generator, device="cpu").tolist()
        dtype = (torch.float32, torch.float16, torch.int64)[turn % 3]
        x = make.full(shape, communicator.rank + 1).to(dtype)
        if (communicator.all_reduce(x) != sum(rank + 1 for rank in _ranks(communicator))).any():
            return f"turn {turn}: all_reduce of {shape} {dtype} is wrong"
        gathered = communicator.all_gather(make.full((shape[0] + communicator.rank, 3), communicator.rank))
        if gathered[:, 0].tolist() != [rank for rank in _ranks(communicator) for _ in range(shape[0] + rank)]:
            return f"turn {turn}: all_gather of {shape[0]} rows and more is wrong"
    return None


def inference_mode(communicator: Communicator) -> str | None:
    """Tensors made under inference_mode may only be written under it, and torch keeps that mode per thread."""
    make = _made_on(communicator)
    with torch.inference_mode():
        x, half = make.ones(4, 6).T, make.ones(5000, dtype=torch.bfloat16)
        communicator.start_all_reduce(x).wait()
        communicator.start_all_reduce(half).wait()
        communicator.all_reduce(x)
        residual = make.zeros(communicator.row_counts(6)[communicator.rank], 4)
        communicator.start_all_reduce_rms_norm(make.ones(6, 4), residual, make.ones(4), 1e-5, site="a").wait()
        started = communicator.start_all_reduce(half)
    started.wait()                                   # the handle remembers what its call was made under
    communicator.all_reduce(x)
    outside = make.ones(4)
    started = communicator.start_all_reduce(outside)
    with torch.inference_mode():
        started.wait()
    scattered = communicator.reduce_scatter(make.ones(communicator.world_size, 2))
    scattered.add_(1)                                # no inference tensor, which would refuse it
    world = communicator.world_size
    right = (x == world**3).all() and (half == world**2).all() and (residual == world).all() and (outside == world).all()
    return None if right else "results are wrong under inference_mode"


def fused_equals_unfused(communicator: Communicator) -> str | None:
    """all_reduce_rms_norm against all_reduce, add and rms_norm, step by step, in fp32."""
    make = _made_on(communicator)
    generator = torch.Generator().manual_seed(communicator.rank)
    x, residual = torch.randn(11, 32, generator=generator, device="cpu").to(communicator.device), make.zeros(11, 32)
    weight = make.linspace(0.5, 1.5, 32)
    shard = make.zeros(communicator.row_counts(11)[communicator.rank], 32)
    for layer in range(3):
        residual += communicator.all_reduce(x.clone())
        plain = rms_norm(residual, weight, 1e-6)
        fused, shard = communicator.all_reduce_rms_norm(x.clone(), shard, weight, 1e-6, site=f"layers.{layer}.o_proj")
        if (fused - plain).abs().max() > 1e-4:
            return f"layer {layer}: off by {(fused - plain).abs().max().item():.2g}"
        x = x * 0.5 + fused / communicator.world_size
    whole = communicator.all_gather(shard)
    return None if torch.allclose(whole, residual, atol=1e-4) else "the gathered residual shards are not the residual"


def barriers_and_signals(communicator: Communicator) -> str | None:
    for turn in range(6):
        if communicator.barrier() is not None:
            return "barrier() returned something"
        communicator.await_signal(turn % communicator.world_size)
    return None


def misuse_is_refused(communicator: Communicator) -> str | None:
    """TypeError or ValueError naming the argument, before anything is sent: ranks stay in step."""
    make = _made_on(communicator)
    norm = (make.ones(4, 8), make.zeros(communicator.row_counts(4)[communicator.rank], 8), make.ones(8))
    world, rows = communicator.world_size, norm[0].shape[0]
    wrong_calls = [
        ("all_reduce", TypeError, "x", ([1, 2],), {}),
        ("all_reduce", TypeError, "x", (make.ones(2) > 0,), {}),
        ("all_reduce", ValueError, "x", (make.ones(1).expand(4),), {}),
        ("all_reduce", ValueError, "grad", (make.ones(2, requires_grad=True),), {}),
        ("reduce_scatter", ValueError, "x", (make.tensor(1.0),), {}),
        ("all_gather", ValueError, "dim", (make.ones(2, 2), 2), {}),
        ("all_gather", ValueError, "sizes", (make.ones(2),), {"sizes": [3] * world}),
        ("broadcast", ValueError, "src", (make.ones(2), world), {}),
        ("broadcast", TypeError, "src", (make.ones(2), "0"), {}),
        ("all_reduce_rms_norm", ValueError, "weight", (norm[0], norm[1], make.ones(7), 1e-5), {"site": "a"}),
        ("all_reduce_rms_norm", ValueError, "residual_shard", (norm[0], make.zeros(rows + 1, 8), norm[2], 1e-5), {"site": "a"}),
        ("all_reduce_rms_norm", TypeError, "x", (norm[0].long(), norm[1], norm[2], 1e-5), {"site": "a"}),
        ("all_reduce_rms_norm", TypeError, "x", (norm[0].to(torch.float8_e4m3fn), norm[1], norm[2], 1e-5), {"site": "a"}),
        ("all_reduce_rms_norm", TypeError, "eps", (*norm, "1e-5"), {"site": "a"}),
        ("all_reduce_rms_norm", ValueError, "eps", (*norm, float("nan")), {"site": "a"}),
        ("all_reduce_rms_norm", TypeError, "weight_offset", (*norm, 1e-5), {"site": "a", "weight_offset": None}),
    ]
    tried = [
        (form + operation, kind, named, functools.partial(getattr(communicator, form + operation), *args, **options))
        for form in ("", "start_") for operation, kind, named, args, options in wrong_calls
    ]
    linear = functools.partial(communicator.linear_all_reduce, make.ones(2, 3), make.ones(4, 5), site="a")
    tried.append(("linear_all_reduce", ValueError, "weight", linear))
    for what, kind, named, refused in tried:
        try:
            refused()
        except kind as error:
            if named not in str(error):
                return f"{what}: the {kind.__name__} does not name {named!r}: {error}"
        else:
            return f"{what}: no {kind.__name__}"
    result = communicator.all_reduce(make.ones(3))
    return None if (result == communicator.world_size).all() else f"after refused calls all_reduce gives {result.tolist()}"


BEHAVIOURS: dict[str, Callable[[Communicator], str | None]] = {
    check.__name__: check
    for check in (
        rows_cover_every_token, empty_gives_a_usable_buffer, many_in_flight, linear_and_barrier_in_flight, synchronous_after_started,
        handles_may_be_dropped, shapes_change_from_call_to_call, inference_mode, fused_equals_unfused, barriers_and_signals,
        misuse_is_refused,
    )
}
