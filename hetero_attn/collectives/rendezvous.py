"""How the ranks of one program find each other: torchrun's environment, its store, and a process group that fits their devices.

torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) starts the ranks; its agent's store outlives any of them.
Whatever stays on one host listens on loopback only. Ranks tell each other their device before they choose: device libraries where every
rank has a device of its own, gloo over host memory where they are mixed.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from hetero_attn.communicator import CommunicatorError

JOIN_S = 300.0                                       # ranks that load slowly (cold disks, many hosts) may join this late
LIBRARIES = {"cuda": "nccl", "npu": "hccl"}
_serial = itertools.count()                          # communicators of one process, in the order they are made on every rank


class World(NamedTuple):
    """torchrun's environment."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def world() -> World:
    """What torchrun set, a world of one where it set nothing. Raises CommunicatorError for a half-set environment."""
    values = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", None), ("LOCAL_WORLD_SIZE", None)):
        text = os.environ.get(name, default)
        try:
            values[name] = None if text is None else int(text)
        except ValueError:
            raise CommunicatorError(f"{name} is {text!r}, expected a whole number; start the ranks with torchrun") from None
    rank, size = values["RANK"], values["WORLD_SIZE"]
    if not 0 <= rank < size:
        raise CommunicatorError(f"RANK is {rank} and WORLD_SIZE {size}, expected 0 <= RANK < WORLD_SIZE; start the ranks with torchrun")
    local_rank = rank if values["LOCAL_RANK"] is None else values["LOCAL_RANK"]
    return World(rank, size, local_rank, values["LOCAL_WORLD_SIZE"] or 1)


def on_one_host(env: World) -> bool:
    """Whether all ranks share this host: torchrun says so, or they meet on a loopback address."""
    return env.local_world_size == env.world_size or _is_loopback(os.environ.get("MASTER_ADDR", "127.0.0.1"))


def served_by_agent() -> bool:
    """Whether torchrun's agent serves the store, so that it outlives every rank; else rank 0 serves it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_store(env: World, timeout_s: float) -> dist.Store:
    """The store that all ranks share, under a prefix of this communicator's own.

    torchrun's agent serves one; without it rank 0 does, on loopback when MASTER_ADDR is that. Raises CommunicatorError.
    """
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = os.environ.get("MASTER_PORT", "")
    if not port.isdigit():
        raise CommunicatorError(f"rank {env.rank}: MASTER_PORT is {port!r}, expected a port number; start the ranks with torchrun")
    from_agent = served_by_agent()
    serves = env.rank == 0 and not from_agent
    options = {"timeout": timedelta(seconds=max(timeout_s, JOIN_S)), "wait_for_workers": False}
    number = next(_serial)
    try:
        store = None if from_agent else _stores.get((address, port))
        if store is None:
            if serves and _is_loopback(address):
                options["master_listen_fd"] = listen_on_loopback(int(port)).detach()
            store = dist.TCPStore(address, int(port), None, serves, **options)
            _stores[address, port] = store           # rank 0's is the server, and serves the communicators made later too
    except (RuntimeError, OSError) as error:
        raise CommunicatorError(
            f"rank {env.rank} of {env.world_size}: cannot reach the store at {address}:{port} [{str(error).splitlines()[0]}]", rank=env.rank
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"hetero_attn/{attempt}/{number}", store)


_stores: dict[tuple[str, str], dist.Store] = {}


def listen_on_loopback(port: int = 0) -> socket.socket:
    """A listening socket on 127.0.0.1. torch's stores listen on every interface unless they are given one."""
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind(("127.0.0.1", port))
        server.listen(1024)
    except OSError:
        server.close()
        raise
    return server


def exchange(store: dist.Store, env: World, key: str, value: str, timeout_s: float) -> list[str]:
    """Every rank's value under `key`, in rank order. Raises CommunicatorError naming the ranks that did not join in time."""
    deadline = time.monotonic() + timeout_s
    waiting = set(range(env.world_size))
    while True:
        try:
            if env.rank in waiting:
                store.set(f"{key}/{env.rank}", value)
            waiting = {rank for rank in waiting if not store.check([f"{key}/{rank}"])}
            if not waiting:
                return [store.get(f"{key}/{rank}").decode() for rank in range(env.world_size)]
        except RuntimeError as error:                # whoever serves the store has ended
            server = "torchrun's agent" if served_by_agent() else "rank 0"
            raise CommunicatorError(
                f"rank {env.rank} of {env.world_size}: {server} is gone, and with it the store where the ranks meet "
                f"[{str(error).splitlines()[0]}]", rank=env.rank, operation="init_communicator", missing=[] if served_by_agent() else [0],
            ) from error
        if time.monotonic() > deadline:
            missing = sorted(waiting)
            raise CommunicatorError(
                f"rank {env.rank} of {env.world_size}: rank {', '.join(map(str, missing))} did not join within {timeout_s:g} s",
                rank=env.rank, operation="init_communicator", missing=missing,
            )
        time.sleep(0.005)


def device_library(devices: list[str]) -> str | None:
    """The device type whose library can connect these ranks, or None for gloo. devices: "host type index" of each rank.

    NCCL and HCCL want every rank on the same type of device and no device twice.
    """
    types = {entry.split()[1] for entry in devices}
    if len(types) != 1 or len(set(devices)) != len(devices):
        return None
    kind = types.pop()
    if kind == "cuda" and not dist.is_nccl_available():
        return None
    return kind if kind in LIBRARIES else None


def join_group(
    store: dist.Store, env: World, native: str | None, device: torch.device, timeout_s: float
) -> tuple[dist.ProcessGroup | None, Callable[[], None]]:
    """A process group over the whole world, and what destroys it. One that others have initialised is left in place."""
    backend = "cpu:gloo" if native is None else f"cpu:gloo,{native}:{LIBRARIES[native]}"
    limit = timedelta(seconds=timeout_s)
    with _gloo_on_loopback(on_one_host(env)):
        if dist.is_initialized():
            if dist.get_world_size() != env.world_size:
                raise CommunicatorError(f"torch.distributed spans {dist.get_world_size()} ranks, WORLD_SIZE says {env.world_size}")
            group = dist.new_group(backend=backend, timeout=limit)
            return group, lambda: _destroy(group)
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=env.rank, world_size=env.world_size, timeout=limit,
            device_id=device if native is not None else None,
        )
        return None, lambda: _destroy(None)


def _destroy(group: dist.ProcessGroup | None) -> None:
    if not dist.is_initialized():
        return
    try:
        dist.destroy_process_group(group)
    except (RuntimeError, ValueError):               # destroyed by others, or broken: there is nothing left to free
        pass


@contextmanager
def _gloo_on_loopback(wanted: bool):
    """gloo picks the interface of the host's name unless told; on one host that is loopback, and nobody else can connect."""
    if not wanted or "GLOO_SOCKET_IFNAME" in os.environ:
        yield
        return
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback
    try:
        yield
    finally:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)


def _is_loopback(address: str) -> bool:
    return address in ("localhost", "::1") or address.startswith("127.")
