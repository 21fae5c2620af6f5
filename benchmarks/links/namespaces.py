"""The network namespaces of an emulated network: making them, asking whether this machine can, and leaving none behind.

A name carries its owner, process id and start time, so that whoever comes next can tell a crashed run's namespaces from a live one's and
remove them. Everything lies in namespaces (devices, queues, processes), so removing those removes all; the host's own network is not
touched. Standard library only: guard.py must start quickly.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from links.build import compiler_reason
from links.command import LinksError, command

PREFIX = "hetero-links"
FOLDER = Path("/var/run/netns")                          # where iproute2 keeps them
NAME = re.compile(rf"{PREFIX}-(\d+)-(\d+)-\d+-\w+")      # owner's process id, its start time, serial number, rank
PATIENCE_S = 5.0


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None = there is no such process, or it is dead and not yet collected."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def names_of(owner: int, serial: int, ranks: int) -> list[str]:
    """The namespaces of one network of process `owner`: one per rank."""
    return [f"{PREFIX}-{owner}-{start_time(owner)}-{serial}-{rank}" for rank in range(ranks)]


def present() -> list[str]:
    """Every namespace of ours on this machine, whoever owns it."""
    try:
        return sorted(name for name in os.listdir(FOLDER) if NAME.fullmatch(name))
    except OSError:
        return []


def sweep() -> list[str]:
    """Remove what processes left that are no more, their temporary folders too; returns the namespaces' names."""
    left = []
    for name in present():
        pid, started = map(int, NAME.fullmatch(name).groups())
        if start_time(pid) != started:
            left.append(name)
    remove(left)
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}-*-*-*"):
        owner = re.match(rf"{PREFIX}-(\d+)-(\d+)-", folder.name)
        if owner and start_time(int(owner[1])) != int(owner[2]):
            shutil.rmtree(folder, ignore_errors=True)
    return left


def temporary_folder() -> str:
    """A new folder for this process's files, which sweep() knows as its."""
    return tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-{start_time(os.getpid())}-")


def remove(names: Iterable[str]) -> None:
    """End all processes in these namespaces (SIGKILL) and delete them; one that is gone is no error."""
    names = [name for name in names if (FOLDER / name).exists()]
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        pids = [pid for name in names for pid in processes(name)]
        if not pids:
            break
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.02)
    for name in names:
        try:
            command("ip", "netns", "delete", name)
        except LinksError:
            if (FOLDER / name).exists():
                raise


def processes(name: str) -> list[int]:
    """The processes in a namespace; [] where it is gone."""
    done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return [int(pid) for pid in done.stdout.split() if int(pid) != os.getpid()]


@functools.cache
def unavailable() -> str | None:
    """Why there can be no emulated network here, with the remedy; None = there can."""
    if not sys.platform.startswith("linux"):
        return f"this is {sys.platform}; network namespaces are Linux's"
    if os.geteuid() != 0:
        return "not root: network namespaces and tc need it (sudo, or a container with CAP_SYS_ADMIN and CAP_NET_ADMIN)"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"no `{program}` on PATH; install iproute2 (Debian, Ubuntu: apt install iproute2)"
    if not has_netem():
        try:
            os.close(os.open("/dev/net/tun", os.O_RDWR))
        except OSError as error:
            return f"/dev/net/tun: {error.strerror}, and there is no sch_netem either; modprobe tun, or give the container the device"
        if reason := compiler_reason():
            return f"the switch between namespaces cannot be compiled: {reason}"
    return _queue_reason("tbf", "rate", "8mbit", "burst", "20000", "limit", "20000")


@functools.cache
def has_netem() -> bool:
    """Whether the kernel can delay packets by itself (sch_netem)."""
    return _queue_reason("netem", "delay", "1ms") is None


def _queue_reason(*discipline: str) -> str | None:
    """Why a namespace with this queueing discipline cannot be made; None = it can: it has been."""
    name = f"{PREFIX}-{os.getpid()}-{start_time(os.getpid())}-0-probe"
    try:
        try:
            command("ip", "netns", "add", name)
            command("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "lo", "root", *discipline)
        finally:
            remove([name])
    except LinksError as error:
        return str(error).replace(name, "PROBE")
    return None
