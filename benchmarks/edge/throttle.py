"""A disk of its own for every process: a control group that limits what the process reads from the disk that holds a folder.

Version 1 (blkio.throttle) and version 2 (io.max) of control groups; root only. The limit is the kernel's, below the page cache: direct
reads, ordinary ones and page faults all pass it. A group lives as long as its block, and sweep() removes those of processes that were
killed in it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

VERSION_1, VERSION_2 = Path("/sys/fs/cgroup/blkio"), Path("/sys/fs/cgroup")
PREFIX = "hetero-attn-bench-"   # + the process in it


def disk_of(folder: str | Path) -> str:
    """"major:minor" of the whole disk that holds a folder. Raises OSError where the file system has no disk of its own (tmpfs, overlay)."""
    number = os.stat(folder).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not device.exists():
        raise OSError(f"{folder} is on no disk of the kernel's ({os.major(number)}:{os.minor(number)}); give --scratch another")
    device = device.resolve()
    if (device / "partition").exists():              # limits are for whole disks
        device = device.parent
    return (device / "dev").read_text().strip()


def unavailable(folder: str | Path) -> str | None:
    """Why reads of this folder's disk cannot be limited here, None where they can."""
    if os.geteuid() != 0:
        return "control groups are root's to make"
    try:
        disk_of(folder)
    except OSError as error:
        return str(error)
    if _first():
        return None
    if "io" in _words(VERSION_2 / "cgroup.subtree_control"):
        return None
    return "there is no control group for reads: neither blkio.throttle (version 1) nor io in cgroup.subtree_control (version 2)"


def described() -> str:
    """What limits the reads here, in words."""
    return "blkio.throttle.read_bps_device, version 1" if _first() else "io.max, version 2"


@contextlib.contextmanager
def limited(folder: str | Path, mbytes_s: float | None) -> Iterator[None]:
    """This process reads at most mbytes_s (10^6 bytes a second) from the folder's disk in the block; None: as it likes."""
    if mbytes_s is None:
        yield
        return
    first = _first()
    root = VERSION_1 if first else VERSION_2
    group, before = root / f"{PREFIX}{os.getpid()}", _own_processes(root, first)
    group.mkdir()
    try:
        disk, rate = disk_of(folder), int(mbytes_s * 1e6)
        if first:
            (group / "blkio.throttle.read_bps_device").write_text(f"{disk} {rate}\n")
        else:
            (group / "io.max").write_text(f"{disk} rbps={rate}\n")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        with contextlib.suppress(OSError):
            before.write_text(str(os.getpid()))
        _remove(group)


def sweep() -> int:
    """Removes the groups of processes that ended inside them; how many. A process that lives keeps its own, be it not yet in it."""
    return sum(_remove(group) for root in (VERSION_1, VERSION_2) for group in root.glob(f"{PREFIX}*")
               if not Path("/proc", group.name.removeprefix(PREFIX)).exists() and not _words(group / "cgroup.procs"))


def _first() -> bool:
    """Whether it is version 1 that limits reads here."""
    return (VERSION_1 / "blkio.throttle.read_bps_device").exists()


def _own_processes(root: Path, first: bool) -> Path:
    """Where this process is to go back to: its own group, or the root's where that is not to be seen (in a container)."""
    own = root / _own_group(first) / "cgroup.procs"
    return own if own.exists() else root / "cgroup.procs"


def _own_group(first: bool) -> str:
    """The group this process is in, relative to the hierarchy's root."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if ("blkio" in controllers.split(",")) if first else number == "0":
            return path.lstrip("/")
    return ""


def _remove(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:                                  # gone already, or somebody is still in it
        return False
    return True


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
