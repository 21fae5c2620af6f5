"""Collectives in shared memory beyond their conformance suite: the fused norm, memory that is shared, calls of all kinds.

Ranks are real processes, as many as the test needs: four on two cores is the crowded case. The races that only a sanitizer sees are in
test_shared_memory_races.py, lost ranks in test_shared_memory_faults.py.
"""

import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from hetero_attn import CommunicatorError
from hetero_attn.norm import rms_norm
from hetero_attn.testing.collectives import digest
from hetero_attn.testing.ranks import make_communicator, on_ranks

FOLDER, PREFIX = Path("/dev/shm"), "hetero-attn-"
pytestmark = [
    pytest.mark.ranks, pytest.mark.timeout(600),
    pytest.mark.skipif(not sys.platform.startswith("linux") or not FOLDER.is_dir(), reason="shared memory is for Linux with /dev/shm"),
]
FULL = os.environ.get("HETERO_ATTN_FULL") == "1"
CALLS = 50_000 if FULL else 2_000
HALF_STEP = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}            # of a normed value near 1


def segments():
    return [path.name for path in FOLDER.glob(f"{PREFIX}*")] if FOLDER.is_dir() else []


# ---- what all ranks do together, in one set of ranks per world size --------------------------------------------------------------------


def everything(communicator):
    for check in (fused_is_unfused, private_and_shared_tensors, memory_comes_back, two_threads_make_tensors, room_grows, a_second_group,
                  unlike_parts_are_seen, out_of_range, calls_of_all_kinds):
        complaint = check(communicator)
        if complaint:                                # leave: the others, who go on, find out at once
            raise AssertionError(f"{check.__name__}: {complaint}")
    return segments()


def fused_is_unfused(communicator):
    """Against the base's unfused form: to rounding, and the same bits on every rank; x stays as it is unless it is a shared buffer."""
    digests = []
    generator = torch.Generator().manual_seed(5)                       # the same on every rank
    for turn, (tokens, channels) in enumerate([(0, 8), (1, 4096), (2, 24), (3, 1000), (8, 4096), (33, 17), (130, 2048), (257, 5)]):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            wide = (torch.float32, dtype, torch.bfloat16)[turn % 3]                           # a residual of its own dtype
            weight = torch.randn(channels, generator=generator).to((dtype, torch.float32, torch.float16)[turn % 3])
            post = torch.randn(channels, generator=generator).to(dtype) if turn % 2 else None
            own = communicator.rows(tokens)
            residual = torch.randn(tokens, channels, generator=generator)[own].to(wide)
            mine = torch.Generator().manual_seed(communicator.rank * 1000 + turn)
            x = torch.randn(tokens, channels, generator=mine).to(dtype)
            options = {"site": "a", "weight_offset": float(turn % 4 == 1), "post_weight": post}
            want, want_residual = communicator.base.all_reduce_rms_norm(x.clone(), residual.clone(), weight, 1e-5, **options)
            shared = communicator.empty(x.shape, dtype).copy_(x)
            for form, given in (("private", x.clone()), ("shared", shared)):
                kept = residual.clone()
                out, updated = communicator.all_reduce_rms_norm(given, kept, weight, 1e-5, **options)
                if updated is not kept or out.dtype != dtype:
                    return f"{form}: the residual was not updated in place, or the result is {out.dtype}"
                if form == "private" and not torch.equal(given, x):
                    return "a private x was written"
                size = max(1.0, want.abs().max().item()) if tokens else 1.0
                error = (out.double() - want.double()).abs().max().item() if tokens else 0.0
                if error > HALF_STEP[dtype] * size:
                    return f"{form} {tokens}x{channels} {dtype} residual {wide}: off by {error:.3g} of {size:.3g}"
                if kept.numel() and (kept.double() - want_residual.double()).abs().max() > HALF_STEP[wide] * 8:
                    return f"{form} {tokens}x{channels} {dtype}: the residual is off"
                digests.append(digest(out))
    others = communicator.base.all_gather(torch.tensor([int(text, 16) >> 1 for text in digests]).view(1, -1))
    return None if all(torch.equal(row, others[0]) for row in others) else "the ranks' bits differ"


def calls_of_all_kinds(communicator):
    """Changing operations, shapes, dtypes, sites, places of the tensors, delays; every result is known."""
    world, total = communicator.world_size, communicator.world_size * (communicator.world_size + 1) // 2
    same = torch.Generator().manual_seed(11)
    own = torch.Generator().manual_seed(communicator.rank)
    draws, mine = torch.randint(0, 1 << 30, (CALLS, 4), generator=same).tolist(), torch.randint(0, 64, (CALLS,), generator=own).tolist()
    for turn, ((kind, size, dtype, extra), luck) in enumerate(zip(draws, mine)):
        dtype = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float64)[dtype % 5]
        size = size % 200_000 if size % 50 == 0 else size % 3000
        site = f"layers.{turn % 32}.o_proj"
        if luck == 0:
            time.sleep(0.002)
        shape = (size % 37, size // 37) if luck % 2 else (size % 37, size // 37, 1)
        make = communicator.empty if luck % 3 == 0 else lambda shape, dtype: torch.empty(shape, dtype=dtype)
        x = make((size,), dtype).fill_(communicator.rank + 1)
        if kind % 5 == 0:
            wrong = (communicator.all_reduce(x, site=site) != total).any()
        elif kind % 5 == 1:
            parts = communicator.all_gather(x[: size // 2 + communicator.rank], site=site)
            sizes = [min(size // 2 + rank, size) for rank in range(world)]
            wrong = parts.tolist() != [rank + 1 for rank in range(world) for _ in range(sizes[rank])]
        elif kind % 5 == 2:
            wrong = (communicator.broadcast(x, extra % world, site=site) != extra % world + 1).any()
        elif kind % 5 == 3:
            rows = make((size % 37, size // 37), dtype).fill_(communicator.rank + 1)
            wrong = (communicator.reduce_scatter(rows, site=site) != total).any()
        else:
            rows = make((size % 37, size // 37 + 1), torch.bfloat16 if extra % 2 else torch.float32).fill_(communicator.rank + 1)
            residual = torch.zeros(communicator.row_counts(rows.shape[0])[communicator.rank], rows.shape[1], dtype=rows.dtype)
            started = communicator.start_all_reduce_rms_norm(rows, residual, torch.ones(rows.shape[1], dtype=rows.dtype), 0.0, site=site)
            wrong = ((started.wait()[0] - 1).abs() > 0.01).any() or (residual != total).any()
        if wrong:
            return f"call {turn}: operation {kind % 5} of {size} {dtype} {shape} is wrong"
    return None


def private_and_shared_tensors(communicator):
    """Ranks need not agree on where their tensors lie, nor on their strides and alignment; large ones come in chunks."""
    for size in (5, 3000, 700_001, 3_000_000):
        kinds = [communicator.empty((size,), torch.float32), torch.empty(size), torch.empty(2 * size)[::2], torch.empty(size + 3)[3:]]
        for shift in range(4):
            x = kinds[(communicator.rank + shift) % 4]
            x.copy_(torch.arange(size) % 97 + communicator.rank)
            communicator.all_reduce(x)
            want = (torch.arange(size) % 97) * communicator.world_size + sum(range(communicator.world_size))
            if not torch.equal(x, want.float()):
                return f"size {size}, rank {communicator.rank}, kind {(communicator.rank + shift) % 4}: wrong"
    return None


def memory_comes_back(communicator):
    """A thousand buffers, one after the other and in threes, fit where three do; two that live never overlap; views keep theirs alive."""
    heap = communicator._heap
    kept = communicator.empty((100,), torch.float32).fill_(7.0)[10:20]
    for turn in range(1000):
        buffers = [communicator.empty((200_000 + 64 * ((turn + each) % 9),), torch.float32).fill_(each) for each in range(3)]
        if not all(heap.holds(each.data_ptr()) for each in buffers):
            return f"turn {turn}: a buffer is not in shared memory"
        if any((each != value).any() for value, each in enumerate(buffers)):
            return f"turn {turn}: buffers overlap"
    return None if heap.holds(kept.data_ptr()) and (kept == 7).all() else "a view's memory was given to another"


def two_threads_make_tensors(communicator):
    """The communication thread makes a tensor for a result while the caller makes the next layer's: no memory is given out twice."""
    wrong, interval = [], sys.getswitchinterval()

    def make(mark):
        held = []
        try:
            for turn in range(3000):
                held.append(communicator.empty((64 + turn * 7 % 500,), torch.float32).fill_(mark))
                if len(held) > 20 and (held.pop(0) != mark).any():
                    wrong.append(f"turn {turn}: memory was given out twice")
        except Exception as error:
            wrong.append(repr(error))

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=make, args=(mark,)) for mark in (1.0, 2.0)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(interval)
    return wrong[0] if wrong else None


def unlike_parts_are_seen(communicator):
    """Ranks that differ in `sizes`, of equal sums, are told so (they would read one another's stale memory), and a closed group says it."""
    world, rank = communicator.world_size, communicator.rank
    sizes = [2, 3, 1, *[2] * (world - 3)] if rank == 0 else [2] * world
    if world == 2:
        sizes = [[2, 3], [3, 2]][rank]
    with make_communicator("cpu") as second:
        try:
            second.all_gather(torch.ones(2), sizes=sizes)
        except CommunicatorError as error:
            if "made another call" not in str(error):
                return str(error)
        else:
            return "nobody noticed"
        if second._heap.holds(second.empty((8,), torch.float32).data_ptr()):
            return "memory that a late rank may still write to was given out"
    third = make_communicator("cpu")
    third.close()
    for call in (third.barrier, lambda: third.base.in_background(lambda: 1)):
        try:
            call()
        except CommunicatorError as error:
            if "has been closed" not in str(error):
                return str(error)
        else:
            return "a closed group took a call"
    return None


def room_grows(communicator):
    """A buffer beyond the heap is private at first, on any one rank, and shared once the ranks have met."""
    shape = (1_000_000 + sum(end - start for start, end in communicator._heap.ranges),)
    early = communicator.empty(shape, torch.uint8) if communicator.rank == 0 else None
    if early is not None and communicator._heap.holds(early.data_ptr()):
        return "the heap was larger than thought"
    communicator.all_reduce(torch.ones(3))
    x = communicator.empty(shape, torch.uint8).fill_(1)
    if not communicator._heap.holds(x.data_ptr()):
        return "there is no more room after growing"
    communicator.all_reduce(x)
    return None if (x == communicator.world_size).all() else "the sum in the added segment is wrong"


def a_second_group(communicator):
    """Two groups of one process know nothing of one another; buffers outlive their group."""
    second = make_communicator("cpu")
    with second:
        x, y = second.empty((1000,), torch.float32).fill_(1), communicator.empty((1000,), torch.float32).fill_(2)
        handles = [second.start_all_reduce(x), communicator.start_all_reduce(y)]
        second.all_reduce(torch.ones(5000))
        communicator.all_reduce(torch.ones(5000))
        [handle.wait() for handle in handles]
        foreign = second.all_reduce(communicator.empty((1000,), torch.float32).fill_(1))
    world = communicator.world_size
    right = (x == world).all() and (y == 2 * world).all() and (foreign == world).all()
    return None if right and (communicator.all_reduce(torch.ones(2)) == world).all() else "two groups disturb one another"


def out_of_range(communicator):
    """Rows longer than a staging buffer, weights in fp64, a strided residual: composed or copied, never wrong."""
    world = communicator.world_size
    for channels, dtype in ((400_000, torch.float32), (6, torch.float64)):
        rows = communicator.row_counts(3)[communicator.rank]
        residual = torch.zeros(rows, 2 * channels, dtype=dtype)[:, ::2]
        x = torch.randn(3, channels, dtype=dtype, generator=torch.Generator().manual_seed(1))
        out, kept = communicator.all_reduce_rms_norm(x.clone(), residual, torch.ones(channels, dtype=torch.float64), 1e-6, site="a")
        want = rms_norm(x * world, torch.ones(channels, dtype=torch.float64), 1e-6)
        if kept is not residual or (out - want).abs().max() > 1e-5:
            return f"{channels} channels of {dtype}: off by {(out - want).abs().max():.2g}"
    return None


@pytest.mark.parametrize("world_size", [2, 4] + [3] * FULL)
def test_together(world_size):
    outcomes = on_ranks(everything, (), world_size, communicator="cpu", timeout_s=240 if not FULL else 580)
    said = [f"rank {rank}: {outcome.traceback}" for rank, outcome in enumerate(outcomes) if outcome.error]
    assert not said, "\n".join(sorted(said, key=lambda text: "CommunicatorError" in text))
    assert all(outcome.result == [] for outcome in outcomes) and segments() == []
