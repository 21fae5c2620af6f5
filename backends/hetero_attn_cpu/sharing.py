"""Whether the ranks of a group can share memory, and the communicator for those that can.

Every rank says the same few things over the base (host, user, which /dev/shm, cores, its own objections), so all of them come to the same
verdict and none waits for one that has given up.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from pathlib import Path

from hetero_attn.communicator import Communicator
from hetero_attn.profile import DeviceProfile
from hetero_attn_cpu.communicator import SharedMemoryCommunicator
from hetero_attn_cpu.group import Sizes
from hetero_attn_cpu.segments import FOLDER, Segment, free_bytes, release, share, sweep_abandoned, tell_all
from hetero_attn_cpu.shared_calls import SharedCalls

MAX_RANKS = 64                                       # ha::MAX_RANKS
# What a profile may force that only the communicator over torch.distributed has.
_FORCIBLE = {"algorithm": ("auto",), "codec": ("none", "auto")}


def shared_memory_communicator(base: Communicator, profile: DeviceProfile, calls: SharedCalls) -> Communicator | list[str]:
    """The communicator, or the reasons against it, which are every rank's alike. All ranks call it together.

    Raises CommunicatorError when a rank is lost meanwhile.
    """
    reasons = _own_reasons(base, profile)
    sizes = [profile.shared_stage_bytes, profile.shared_heap_bytes]
    here = {"reasons": reasons, "host": _host(), "cores": _cores(), "quota": _quota(), "sizes": sizes}
    told = [json.loads(text) for text in tell_all(base, json.dumps(here))]
    reasons = [f"rank {rank}: {reason}" for rank, each in enumerate(told) for reason in each["reasons"]]
    away = [rank for rank, each in enumerate(told) if each["host"] != told[0]["host"]]
    if away and not reasons:
        names = {rank: f"{told[rank]['host'].get('name')} (user {told[rank]['host'].get('user')})" for rank in (0, away[0])}
        reasons = [f"rank 0 is on {names[0]} and rank {away[0]} on {names[away[0]]}: they share no memory (one host, one user and one "
                   f"{FOLDER} are needed); 'distributed' serves them"]
    if reasons:
        return reasons
    cores = min(len(set().union(*(each["cores"] for each in told))), *(each["quota"] for each in told))
    if base.rank == 0:
        sweep_abandoned()
    sizes = Sizes(*told[0]["sizes"])                 # rank 0's profile counts: all segments are laid out alike
    size = calls.group_reserved(sizes.stage) + sizes.heap
    made = share(base, size)
    if not isinstance(made[0], Segment):
        return [f"{reason} (asked for: {base.world_size} ranks of {size / 2**20:.1f} MiB)" for reason in made]
    try:
        return SharedMemoryCommunicator(base, calls, made, sizes, crowded=base.world_size > cores)
    except BaseException:
        release(made)
        raise


def _own_reasons(base: Communicator, profile: DeviceProfile) -> list[str]:
    reasons = []
    if base.device.type != "cpu":
        reasons.append(f"device is {base.device}, shared memory is for tensors on the cpu")
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        reasons.append(f"system is {platform.system()} on {platform.machine()}, expected 64-bit Linux")
    elif not os.access(FOLDER, os.W_OK):
        reasons.append(f"{FOLDER} cannot be written; mount a tmpfs there")
    elif free_bytes() < (wanted := base.world_size * (2 * profile.shared_stage_bytes + profile.shared_heap_bytes)):
        reasons.append(f"{FOLDER} has {free_bytes() / 2**20:.1f} MiB free, {base.world_size} ranks ask for more than "
                       f"{wanted / 2**20:.1f} MiB; enlarge it (docker run --shm-size) or lower shared_heap_bytes")
    if base.world_size > MAX_RANKS:
        reasons.append(f"world size is {base.world_size}, shared memory serves up to {MAX_RANKS} ranks")
    for field, harmless in _FORCIBLE.items():
        asked = getattr(profile, field, harmless[0])
        if asked not in harmless:
            reasons.append(f"{field} is {asked!r}, which travels over torch.distributed; say {field}: {harmless[0]}")
    return reasons


def _host() -> dict[str, object]:
    """What must be equal for memory to be shared: the running kernel, the user, and which tmpfs /dev/shm is (containers have their own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        found = os.stat(FOLDER)
        return {"name": platform.node(), "boot": boot, "user": os.geteuid(), "folder": [found.st_dev, found.st_ino]}
    except (OSError, AttributeError):
        return {"name": platform.node()}


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _quota() -> int:
    """Cores' worth of time that the control group allows (docker run --cpus); a large number where it sets no bound."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, math.floor(int(limit) / int(period)))
    except (OSError, ValueError):                    # no such file, or "max"
        return 1 << 20
