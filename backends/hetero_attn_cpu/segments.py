"""The shared memory of a group: one segment a rank, mapped by all of them, without a name in the file system where that can be.

A segment is a file in /dev/shm that its rank creates (readable by its user alone, all of its bytes reserved: a full /dev/shm is an error
here and not a SIGBUS later) and the others open. It has no name from the start, and they find it among its rank's descriptors in /proc; so
nothing is left behind, whoever is killed and when. Ranks that see other processes than one another (containers) are told a name, which is
unlinked as soon as all have opened it; what a crash in between leaves is swept by the next group. The owner holds a lock on its file,
which the kernel lifts when the process ends however it ends: that is how the others see that it lives, without process numbers.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import struct
import time
import uuid
from contextlib import suppress
from pathlib import Path

import torch

from hetero_attn.communicator import Communicator

FOLDER = Path("/dev/shm")
PREFIX = "hetero-attn-"
ABANDONED_S = 60.0                                   # a file this old that nobody holds belongs to no group in the making
_FLOCK = struct.Struct("@hhqqi")                     # struct flock of 64-bit Linux: type, whence, start, length, pid


class SegmentError(OSError):
    """A segment could not be made or opened. The text says how many bytes were asked for and how many are free."""


class Segment:
    """One mapped file. memory: its bytes; address: where they lie in this process."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path, self.descriptor, self.size = path, descriptor, size
        self._map = mmap.mmap(descriptor, size)
        self.memory = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @classmethod
    def create(cls, size: int, *, named: bool = False) -> Segment:
        """A new file of `size` bytes, locked by this process; without a name unless it is asked for. Raises SegmentError."""
        path = FOLDER / f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex[:16]}"
        descriptor = -1
        try:
            if named:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            else:
                descriptor = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
                path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(descriptor, 0, size)
            return cls(path, descriptor, size)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
                if named:
                    path.unlink(missing_ok=True)
            free = f"; {free_bytes() / 2**20:.1f} MiB are free there" if error.errno in (errno.ENOSPC, errno.ENOMEM) else ""
            raise SegmentError(f"{FOLDER}: a segment of {size / 2**20:.1f} MiB: {error.strerror}{free}") from None

    @classmethod
    def open(cls, path: Path, size: int, inode: int | None = None) -> Segment:
        """Another rank's file. inode: its number, where a path may lead to another file. Raises SegmentError, also for a file that is
        not as long or not this user's."""
        descriptor = -1
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_NOFOLLOW if inode is None else 0))
            found = os.fstat(descriptor)
            if found.st_size != size or found.st_uid != os.geteuid() or inode not in (None, found.st_ino):
                raise SegmentError(f"{path}: file {found.st_ino} of {found.st_size} bytes of user {found.st_uid}, expected "
                                   f"{'a file' if inode is None else inode} of {size} of user {os.geteuid()}")
            return cls(path, descriptor, size)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise error if isinstance(error, SegmentError) else SegmentError(f"{path}: {error.strerror}") from None

    def is_held(self) -> bool:
        """Whether another process holds the file's lock: the rank that made it lives and has not closed its communicator."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        return _FLOCK.unpack(fcntl.fcntl(self.descriptor, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK

    def unlink(self) -> None:
        """Take its name away, if it has one."""
        if self.path.parent == FOLDER:
            self.path.unlink(missing_ok=True)

    def release(self) -> None:
        """Give up the lock and the descriptor. The mapping goes with the last tensor that lies in it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def free_bytes() -> int:
    """What /dev/shm has left; 0 where there is none."""
    try:
        status = os.statvfs(FOLDER)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def sweep_abandoned() -> None:
    """Remove files of this user's groups that died while they came together."""
    for path in FOLDER.glob(f"{PREFIX}*"):
        with suppress(OSError):
            found = path.lstat()
            if found.st_uid != os.geteuid() or time.time() - found.st_mtime < ABANDONED_S:
                continue
            left = Segment.open(path, found.st_size)
            if not left.is_held():
                path.unlink(missing_ok=True)
            left.release()


def tell_all(base: Communicator, text: str) -> list[str]:
    """Every rank's text, in rank order: bytes over the base, nothing is unpickled."""
    own = torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")
    lengths = base.all_gather(torch.tensor([own.numel()], device="cpu"), sizes=[1] * base.world_size).tolist()
    joined = bytes(base.all_gather(own, sizes=lengths).tolist())
    starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
    return [joined[start : start + length].decode() for start, length in zip(starts, lengths)]


def share(base: Communicator, size: int) -> list[Segment] | list[str]:
    """A new segment of every rank, mapped here, in rank order; or the ranks' reasons, the same on all of them.

    All ranks call it together with the same size. Raises CommunicatorError when one is lost meanwhile.
    """
    made = _share(base, size, named=False)
    return made if isinstance(made[0], Segment) else _share(base, size, named=True)


def _share(base: Communicator, size: int, *, named: bool) -> list[Segment] | list[str]:
    """share() by one of the ways to tell the others where a segment is."""
    made: list[Segment] = []
    own, complete = None, False
    try:
        try:
            own = Segment.create(size, named=named)
            said = {"path": str(own.path), "inode": None if named else os.fstat(own.descriptor).st_ino}
        except OSError as error:
            said = {"reason": str(error)}
        told = [json.loads(text) for text in tell_all(base, json.dumps(said))]
        reasons = [f"rank {rank}: {each['reason']}" for rank, each in enumerate(told) if "reason" in each]
        if not reasons:
            said = ""
            try:
                for rank, each in enumerate(told):
                    made.append(own if rank == base.rank else Segment.open(Path(each["path"]), size, each["inode"]))
            except OSError as error:
                said = str(error)
            reasons = [f"rank {rank}: {text}" for rank, text in enumerate(tell_all(base, said)) if text]
        complete = not reasons
        return made if complete else reasons
    finally:
        if own is not None:
            own.unlink()
        if not complete:
            release(made if own is None else [*made, own])


def release(segments: list[Segment]) -> None:
    """Give up their locks and descriptors; mappings stay."""
    for each in segments:
        each.release()
