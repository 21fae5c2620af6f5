"""init_communicator(): from torchrun's environment to the communicator that the profile prefers and every rank can have.

The one over torch.distributed is always made, as the base; backends may wrap it in their own (shared memory, multimem). The choice is
made together, because a group in which two ranks use different communicators hangs.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys

import torch

from hetero_attn.backend import Backend
from hetero_attn.collectives import rendezvous, tuning
from hetero_attn.collectives.distributed import DistributedCommunicator
from hetero_attn.communicator import Communicator, CommunicatorError, SoloCommunicator
from hetero_attn.profile import DeviceProfile, load_profile

BASE = "distributed"
log = logging.getLogger("hetero_attn")


def init_communicator(
    profile: DeviceProfile | str | None = None, *, timeout_s: float | None = None, device: torch.device | str | None = None
) -> Communicator:
    """Join the ranks that torchrun started; a world of one (no torchrun) gives a SoloCommunicator.

    profile: a DeviceProfile, its name or path, or None to detect it. timeout_s: the longest wait inside one collective (default:
    the profile's). device: where this rank's tensors live (default: the profile's device; LOCAL_RANK picks the GPU). Ranks may
    differ in profile and device. Every rank calls this the same number of times. Raises CommunicatorError naming the ranks that
    did not join, ProfileError and ValueError for a profile or device that cannot be had here.
    """
    env = rendezvous.world()
    if not isinstance(profile, DeviceProfile):
        profile = load_profile(profile, world_size=env.world_size)
    device = _device(device, profile, env)
    if env.world_size == 1:
        return SoloCommunicator(device=device)
    timeout_s = profile.timeout_s if timeout_s is None else timeout_s
    if timeout_s <= 0:
        raise ValueError(f"init_communicator: timeout_s is {timeout_s}, expected seconds above 0")
    if device.type == "cpu":
        schedule_in_batches()
    else:
        torch.get_device_module(device).set_device(device)
    store = rendezvous.open_store(env, timeout_s)
    own = f"{socket.gethostname()} {device.type} {device.index or 0}"
    devices = rendezvous.exchange(store, env, "device", own, max(timeout_s, rendezvous.JOIN_S))
    native = rendezvous.device_library(devices)
    try:
        group, leave = rendezvous.join_group(store, env, native, device, timeout_s)
    except RuntimeError as error:
        raise CommunicatorError(
            f"rank {env.rank} of {env.world_size}: the process group did not come about [{str(error).splitlines()[0]}]", rank=env.rank
        ) from error
    base = DistributedCommunicator(
        env.rank, env.world_size, store, device=device, group=group, native=native or "cpu", timeout_s=timeout_s, leave=leave,
        store_rank=None if rendezvous.served_by_agent() else 0,
    )
    communicator, reasons = choose_communicator(profile, base)
    hosts = [entry.split()[0] for entry in devices]
    worth_measuring = native is None and not rendezvous.on_one_host(env)
    base.choice, source = tuning.settle(base, profile, hosts, worth_measuring=worth_measuring)
    log.debug("communicator %s (%s); %s", type(communicator).__name__, source, reasons)
    return communicator


def choose_communicator(profile: DeviceProfile, base: Communicator) -> tuple[Communicator, dict[str, list[str]]]:
    """The first of profile.communicators that every rank can have, and why not those before it (name -> reasons).

    'distributed' is `base`; any other name is a backend, whose communicator(base, profile) wraps base or gives reasons. The order
    is rank 0's; a name that another rank's profile lacks or whose backend is unavailable there is out. All ranks call this together.
    Raises CommunicatorError with all reasons when nothing is left.
    """
    from hetero_attn import registry  # here, so that a world of one looks for no backend

    reasons: dict[str, list[str]] = {}
    backends = {}
    for name in profile.communicators:
        if name == BASE:
            continue
        try:
            backend = registry.get(name)
        except registry.UnknownBackendError:
            reasons[name] = [f"there is no backend {name!r} on this machine"]
            continue
        reasons[name] = registry.communicator_unavailable(backend)
        if not reasons[name]:
            backends[name] = backend
    offers = _gather_names(base, [name for name in profile.communicators if name == BASE or name in backends])
    for name in offers[0]:
        lacking = [rank for rank, offer in enumerate(offers) if name not in offer]
        if lacking:
            reasons.setdefault(name, []).append(f"rank {', '.join(map(str, lacking))} cannot have it")
        elif name == BASE:
            return base, reasons
        else:
            made = _offer(backends[name], base, profile)
            willing = base.all_gather(torch.tensor([isinstance(made, Communicator)]), sizes=[1] * base.world_size).tolist()
            if all(willing):
                return made, reasons
            if isinstance(made, Communicator):       # ours would work, another rank's does not: drop it, keep the base
                made.base = Communicator(base.rank, base.world_size)     # its close() closes what it wraps, which we go on with
                made.close()
                made = [f"rank {', '.join(str(rank) for rank, yes in enumerate(willing) if not yes)} objects"]
            reasons[name] = made
    lines = "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items() if why)
    base.close()
    raise CommunicatorError(
        f"rank {base.rank} of {base.world_size}: no communicator of profile {profile.name!r} is common to all ranks ({lines}); "
        f"add {BASE!r} to communicators", rank=base.rank, operation="init_communicator",
    )


def _offer(backend: Backend, base: Communicator, profile: DeviceProfile) -> Communicator | list[str]:
    """What the backend makes of base, or reasons; an exception is a reason too, since the other ranks wait for an answer."""
    try:
        made = backend.communicator(base, profile)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    if isinstance(made, Communicator | list):
        return made
    return [f"its communicator() returned {made!r}, expected a Communicator or a list of reasons"]


def _gather_names(base: Communicator, names: list[str]) -> list[list[str]]:
    """Every rank's list, in rank order, as JSON in bytes: nothing is unpickled from the wire."""
    own = torch.tensor(list(json.dumps(names).encode()), dtype=torch.uint8)
    lengths = base.all_gather(torch.tensor([own.numel()]), sizes=[1] * base.world_size).tolist()
    texts = bytes(base.all_gather(own, sizes=lengths).tolist())
    starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
    return [json.loads(texts[start : start + length]) for start, length in zip(starts, lengths)]


def schedule_in_batches() -> None:
    """Put this process, and the threads it will start, under SCHED_BATCH (Linux; no privilege needed, harmless where it fails).

    gloo's small messages otherwise take a scheduler tick or several: its event thread is woken, preempts the caller that holds the
    lock, and spins on it until the tick. A batch process does not preempt on wake-up: 4 ranks, 32 KiB: 5.7 ms -> 1.5 ms.
    """
    if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_OTHER:
        try:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        except OSError:                              # a sandbox that forbids it only costs the speed
            pass


def _device(device: torch.device | str | None, profile: DeviceProfile, env: rendezvous.World) -> torch.device:
    device = torch.device(profile.device if device is None else device)
    if device.type == "cpu":
        return device
    try:
        module = torch.get_device_module(device)
        present = module.is_available()
    except (RuntimeError, AttributeError):
        present = False
    if not present:
        raise ValueError(
            f"profile {profile.name!r}: torch has no device {device.type!r} here; pass device='cpu' or another profile"
        )
    return torch.device(device.type, env.local_rank % module.device_count()) if device.index is None else device


__all__ = ["CommunicatorError", "DistributedCommunicator", "SoloCommunicator", "choose_communicator", "init_communicator"]
