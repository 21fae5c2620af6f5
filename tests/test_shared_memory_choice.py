"""Whether ranks get shared memory, decided alike by all, and what of it is left in the file system: nothing, whoever is killed and when."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hetero_attn import init_communicator
from hetero_attn.collectives import choose_communicator
from hetero_attn.communicator import Communicator
from hetero_attn.parallel.launch import run_ranks
from hetero_attn.profile import load_profile

FOLDER, PREFIX = Path("/dev/shm"), "hetero-attn-"
pytestmark = [
    pytest.mark.ranks, pytest.mark.timeout(600),
    pytest.mark.skipif(not sys.platform.startswith("linux") or not FOLDER.is_dir(), reason="shared memory is for Linux with /dev/shm"),
]


def segments():
    return [path.name for path in FOLDER.glob(f"{PREFIX}*")] if FOLDER.is_dir() else []


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
            chosen.base = Communicator(base.rank, base.world_size)       # leave the base open
            chosen.close()

    choose("another host", sharing, "_host", lambda: {"name": "elsewhere", "boot": "1", "user": 5})
    choose("little room", sharing, "free_bytes", lambda: 1 << 20)
    choose("no room", memory.Segment, "create", classmethod(_no_room))
    choose("not found", memory.Segment, "open", classmethod(_no_room))
    choose("breaks", native.SharedMemoryCommunicator, "__init__", _breaks)
    choose("other processes", memory.Segment, "open", classmethod(_only_by_name))
    choose("as it is", sharing, "free_bytes", sharing.free_bytes)
    base.close()
    return found


def _no_room(cls, *_, **__):
    from hetero_attn_cpu.segments import SegmentError

    raise SegmentError("/dev/shm: a segment of 5.0 MiB: No space left on device; 1.0 MiB are free there")


def _only_by_name(cls, path, size, inode=None):
    """A rank that does not see the others' processes, as in another container."""
    from hetero_attn_cpu.segments import Segment, SegmentError

    if inode is not None:
        raise SegmentError(f"{path}: No such file or directory")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return Segment(path, descriptor, size)


def _breaks(*_, **__):
    raise ValueError("out of luck")


def test_the_choice_is_common_and_says_why():
    first, second = run_ranks(choices, (), 2, timeout_s=120)
    assert all(found[2] == [2.0, 2.0] for found in first.values())
    assert first["as it is"][0] == second["as it is"][0] == "SharedMemoryCommunicator"
    assert first["other processes"][0] == second["other processes"][0] == "SharedMemoryCommunicator"
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
    held = Segment.create(4096, named=True)
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


_KILLED = _SWEEP.replace("sweep_abandoned", "Segment").replace("Segment()", """
import os, signal
made = Segment.create(1 << 20)
again = Segment.open(made.path, 1 << 20, os.fstat(made.descriptor).st_ino)
again.memory[:3] = b"abc"
assert bytes(made.memory[:3]) == b"abc"
for other in (os.fstat(made.descriptor).st_ino + 1, 0):
    try:
        Segment.open(made.path, 1 << 20, other)
    except OSError as error:
        assert "expected" in str(error)
    else:
        raise SystemExit("another file was taken for it")
os.kill(os.getpid(), signal.SIGKILL)
""")


def test_killed_while_it_shares_a_rank_leaves_nothing():
    """The file has no name at any time, so there is none to leave, and it can be told from another that lies under its number."""
    before = segments()
    done = subprocess.run([sys.executable, "-c", _KILLED], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert segments() == before


def test_the_profile_sets_the_sizes():
    from hetero_attn.profile import ProfileError

    with pytest.raises(ProfileError, match="shared_stage_bytes is 5000, expected a multiple of 4096"):
        load_profile("cpu", sets=["shared_stage_bytes=5000"])
    assert run_ranks(small_buffers, (), 2, timeout_s=120) == [(8192, [3.0] * 50_000, True), (8192, [3.0] * 50_000, True)]


def small_buffers():
    """Rank 0's profile has small buffers, and it counts: the sum comes in many chunks."""
    sets = ["communicators=[cpu]", *(["shared_stage_bytes=8192", "shared_heap_bytes=16384"] if os.environ["RANK"] == "0" else [])]
    with init_communicator(load_profile("cpu", sets=sets), timeout_s=20) as communicator:
        total = communicator.all_reduce(torch.full((50_000,), communicator.rank + 1.0))
        fits = communicator._heap.holds(communicator.empty((1000,), torch.float32).data_ptr())
        return communicator._sizes.stage, total.tolist(), fits
