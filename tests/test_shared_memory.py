"""Collectives in shared memory beyond their conformance suite: the fused norm, memory that is shared, and what happens when a rank is lost.

Ranks are real processes, as many as the test needs: four on two cores is the crowded case. The races that only a sanitizer sees are in
test_shared_memory_races.py.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from hetero_attn import CommunicatorError, init_communicator
from hetero_attn.collectives import choose_communicator
from hetero_attn.norm import rms_norm
from hetero_attn.parallel.launch import RankFailure, run_ranks
from hetero_attn.profile import load_profile
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
    for check in (fused_is_unfused, private_and_shared_tensors, memory_comes_back, room_grows, a_second_group, out_of_range,
                  calls_of_all_kinds):
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


# ---- choosing ---------------------------------------------------------------------------------------------------------------------------


def choices():
    """What is chosen, and why not shared memory, when one rank is different; on every rank alike."""
    from hetero_attn_cpu import communicator as native
    from hetero_attn_cpu import segments as memory
    from hetero_attn_cpu import sharing

    base = init_communicator(dataclasses.replace(load_profile("cpu"), communicators=("distributed",)), timeout_s=20)
    profile = dataclasses.replace(load_profile("cpu"), communicators=("cpu", "distributed"))
    found = {}

    def choose(name, module, attribute, value):
        before = getattr(module, attribute)
        if base.rank == 1:
            setattr(module, attribute, value)
        chosen, reasons = choose_communicator(profile, base)
        setattr(module, attribute, before)
        found[name] = (type(chosen).__name__, reasons.get("cpu"), base.all_reduce(torch.ones(2)).tolist())
        if chosen is not base:
            chosen.base = type(chosen).__mro__[1](base.rank, base.world_size)           # leave the base open
            chosen.close()

    choose("another host", sharing, "_host", lambda: {"name": "elsewhere", "boot": "1", "user": 5})
    choose("little room", sharing, "free_bytes", lambda: 1 << 20)
    choose("no room", memory.Segment, "create", classmethod(_no_room))
    choose("not found", memory.Segment, "open", classmethod(_no_room))
    choose("breaks", native.SharedMemoryCommunicator, "__init__", _breaks)
    choose("as it is", sharing, "free_bytes", sharing.free_bytes)
    base.close()
    return found


def _no_room(cls, *_):
    from hetero_attn_cpu.segments import SegmentError

    raise SegmentError("/dev/shm: a segment of 5.0 MiB: No space left on device; 1.0 MiB are free there")


def _breaks(*_, **__):
    raise ValueError("out of luck")


def test_the_choice_is_common_and_says_why():
    first, second = run_ranks(choices, (), 2, timeout_s=120)
    assert all(found[2] == [2.0, 2.0] for found in first.values())
    assert first["as it is"][0] == second["as it is"][0] == "SharedMemoryCommunicator"
    for name in ("another host", "little room", "no room", "not found"):
        assert first[name][0] == "DistributedCommunicator" and first[name] == second[name], name
    assert "rank 1 on elsewhere" in first["another host"][1][0]
    assert "rank 1: /dev/shm has 1.0 MiB free, 2 ranks ask for more than" in first["little room"][1][0]
    assert "rank 1" in first["no room"][1][0] and "No space left" in first["no room"][1][0]
    assert first["breaks"][0] == "DistributedCommunicator" and "rank 1 objects" in first["breaks"][1][0]
    assert "out of luck" in second["breaks"][1][0]
    assert segments() == []


def test_what_a_crash_left_is_swept_and_what_lives_is_not():
    from hetero_attn_cpu.segments import Segment, sweep_abandoned

    left, fresh = FOLDER / f"{PREFIX}1-left", FOLDER / f"{PREFIX}1-fresh"
    held = Segment.create(4096)
    try:
        for path in (left, fresh):
            path.write_bytes(b"\0" * 4096)
        for path in (left, held.path):
            os.utime(path, (0, 0))
        # Locks do not bar the process that holds them: another one sweeps.
        subprocess.run([sys.executable, "-c", _SWEEP], check=True)
        assert not left.exists() and fresh.exists() and held.path.exists()
        held.release()
        sweep_abandoned()
        assert not held.path.exists()
    finally:
        for path in (left, fresh, held.path):
            path.unlink(missing_ok=True)


_SWEEP = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "backends")]!r}
from hetero_attn_cpu.segments import sweep_abandoned
sweep_abandoned()
"""


# ---- ranks that are lost ----------------------------------------------------------------------------------------------------------------


def survive(folder, fault):
    """Rank 1 has the fault while the others are in the middle of calls; they write down what they see."""
    if os.environ["RANK"] != "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)        # the launcher would end the survivors before they could say anything
    communicator = make_communicator("cpu", timeout_s=2.0)
    x = torch.ones(300_000)
    communicator.all_reduce(x)
    if communicator.rank == 1:
        if fault == "killed":
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif fault == "stopped":
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        elif fault == "closed":
            communicator.close()
            time.sleep(6)
            return
        elif fault == "out of step":
            communicator.start_broadcast(torch.ones(9)).wait()
    began = time.monotonic()
    seen = {}
    try:
        while True:
            communicator.all_reduce(x.fill_(1.0), site="layers.1.o_proj")
            seen["last good"] = time.monotonic()
    except CommunicatorError as error:
        seen |= {"text": str(error), "missing": error.missing}
    seen["took"] = time.monotonic() - seen.pop("last good", began)
    for again in (lambda: communicator.all_reduce(x), communicator.barrier, lambda: communicator.start_all_reduce(x).wait()):
        with pytest.raises(CommunicatorError) as caught:
            again()
        assert str(caught.value) == seen["text"]
    began = time.monotonic()
    communicator.close()
    seen["close took"] = time.monotonic() - began
    part = Path(folder) / f"{communicator.rank}.part"
    part.write_text(json.dumps(seen))
    part.rename(part.with_suffix(".json"))
    sys.exit(1)


@pytest.mark.parametrize("fault", ["killed", "stopped", "closed", "out of step"])
def test_the_survivors_name_who_is_missing(monkeypatch, tmp_path, fault):
    from hetero_attn.parallel import rank_watch

    monkeypatch.setattr(rank_watch, "GRACE_S", 20.0 if fault == "killed" else 3.0)
    with pytest.raises(RankFailure):
        run_ranks(survive, (str(tmp_path), fault), 3, timeout_s=60)
    seen = {int(path.stem): json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(seen) >= {0, 2}
    for rank, saw in seen.items():
        assert f"rank {rank} of 3" in saw["text"] and saw["close took"] < 6, saw
        if fault == "out of step":
            assert saw["missing"] == [] and "every rank is alive" in saw["text"]
        else:
            assert saw["missing"] == [1] and "all_reduce of x [300000] float32 at layers.1.o_proj" in saw["text"], saw
        words = {"killed": "rank 1 has ended", "stopped": "rank 1 did not come", "closed": "rank 1 has closed its communicator",
                 "out of step": "made another call"}
        assert words[fault] in saw["text"], saw
        # seen at once or at the time-out, and two seconds for the roll call
        assert saw["took"] < (2 + 4 if fault == "stopped" else 4), saw
    assert segments() == []


def wait_idly():
    """Rank 0 waits 1.5 s for rank 1; the processor time that takes. Then Ctrl-C ends a wait that nobody else would end."""
    communicator = make_communicator("cpu", timeout_s=20.0)
    communicator.barrier()
    if communicator.rank == 1:
        time.sleep(1.5)
    before = time.process_time()
    communicator.barrier()
    burnt = time.process_time() - before
    if communicator.rank == 1:
        try:
            communicator.base.await_signal(0)                # while rank 0 waits in another collective
            time.sleep(0.1)
            communicator.barrier()
        except CommunicatorError as error:
            return str(error)
        return "no error"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    try:
        communicator.barrier(site="a")
    except KeyboardInterrupt:
        pass
    took = time.monotonic() - began
    try:
        communicator.barrier()
        later = "no error"
    except CommunicatorError as error:
        later = str(error)
    communicator.close()
    return burnt, took, later


def test_a_wait_burns_no_core_and_ctrl_c_ends_it():
    (burnt, took, later), other = run_ranks(wait_idly, (), 2, timeout_s=60)
    assert burnt < 0.3, f"{burnt:.2f} s of processor time in a wait of 1.5 s"
    assert 0.4 < took < 2.0 and "barrier at a was interrupted" in later
    assert "rank 0" in other and "no error" not in other
