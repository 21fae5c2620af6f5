"""Reading slices of files past the page cache: what is read once a token must neither count as ours nor push out what others have cached.

Direct reads (O_DIRECT) where the file system has them, else ordinary ones whose pages are dropped at once. Direct reads want file offsets,
lengths and addresses in multiples of 4096 bytes: what is aligned goes straight to its place, the rest through a small buffer of the
thread's own. Rows of a column slice that lie close together are read with what is between them; a disk reads on faster than it seeks.

What a direct read is into decides its rate: of scattered 4 KiB pages no more than max_segments (254 here) go into one request, each with
an address of its own, and 1 MiB becomes two requests; in huge pages 2 MiB are one request of one or two addresses. A virtual disk, 2 cores:
1.1 GB/s into 4 KiB pages, be it 1 or 8 reads at once and 0.5 or 4 MiB each, and 2.6 to 3.6 GB/s into huge ones.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from hetero_attn.host_memory import HUGE_PAGE_BYTES

ALIGN = 4096                    # satisfies every block device and page size that O_DIRECT asks for
CHUNK = 2 << 20                 # bytes of one read: into huge pages 2.6 GB/s with 1 MiB, 3.6 with 2, 3.1 with 4 (two threads)
GAP = 1 << 16                   # rows further apart than this are read one by one


class DiskError(OSError):
    """A file that ends early or cannot be read, in one line."""


@dataclass(frozen=True)
class Extent:
    """`rows` runs of `row_bytes`, `stride` apart from `position` on in `file`, which go side by side to byte `into` of a buffer."""

    file: Path
    position: int
    row_bytes: int
    into: int
    rows: int = 1
    stride: int = 0

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def read_bytes(self) -> int:
        """What the disk gives for it: the gaps too, where they are read with the rows."""
        through = self.rows > 1 and self.stride - self.row_bytes <= GAP
        return (self.rows - 1) * self.stride + self.row_bytes if through else self.nbytes


def extents(
    file: Path, position: int, itemsize: int, shape: Sequence[int], own: Sequence[range], into: int, into_strides: Sequence[int]
) -> Iterator[Extent]:
    """Where the slice `own` of a row-major tensor `shape`, at byte `position` of `file`, lies; its destination begins at byte `into`.

    own: a range for each of the first dimensions, the further ones are whole. into_strides: the destination's strides in elements.
    """
    own = [*own, *map(range, shape[len(own):])]
    if not all(map(len, own)):
        return
    inner = itemsize
    for size in shape[1:]:
        inner *= size
    whole = all(len(part) == size for part, size in zip(own[1:], shape[1:]))
    if whole and _row_major(own, into_strides):
        yield Extent(file, position + own[0].start * inner, len(own[0]) * inner, into)
    elif len(shape) == 2 and _row_major(own, into_strides):
        first = position + own[0].start * inner + own[1].start * itemsize
        yield Extent(file, first, len(own[1]) * itemsize, into, len(own[0]), inner)
    else:
        for place, index in enumerate(own[0]):
            yield from extents(file, position + index * inner, itemsize, shape[1:], own[1:],
                               into + place * into_strides[0] * itemsize, into_strides[1:])


def _row_major(own: Sequence[range], strides: Sequence[int]) -> bool:
    expected = 1
    for part, stride in zip(reversed(own), reversed(strides)):
        if stride != expected and len(part) > 1:
            return False
        expected *= len(part)
    return True


def joined(parts: Iterable[Extent]) -> list[Extent]:
    """The same with neighbours that lie together, in the file and in the buffer, made one."""
    found: list[Extent] = []
    for part in parts:
        last = found[-1] if found else None
        if (last is not None and last.rows == part.rows == 1 and last.file == part.file
                and last.position + last.row_bytes == part.position and last.into + last.row_bytes == part.into):
            found[-1] = Extent(last.file, last.position, last.row_bytes + part.row_bytes, last.into)
        else:
            found.append(part)
    return found


def chunks(extent: Extent) -> Iterator[Extent]:
    """The extent in reads of about CHUNK bytes, cut at the disk's alignment where it is one run."""
    if extent.rows == 1:
        at, end = extent.position, extent.position + extent.row_bytes
        while at < end:
            stop = min(end, at - at % ALIGN + CHUNK)
            yield Extent(extent.file, at, stop - at, extent.into + at - extent.position)
            at = stop
    elif extent.stride - extent.row_bytes > GAP or extent.stride > CHUNK:
        for row in range(extent.rows):
            run = Extent(extent.file, extent.position + row * extent.stride, extent.row_bytes, extent.into + row * extent.row_bytes)
            yield from chunks(run)
    else:
        step = max(1, CHUNK // extent.stride)
        for row in range(0, extent.rows, step):
            yield Extent(extent.file, extent.position + row * extent.stride, extent.row_bytes, extent.into + row * extent.row_bytes,
                         min(step, extent.rows - row), extent.stride)


def buffer(nbytes: int) -> memoryview:
    """Memory of whole pages for direct reads, as many of it as fit huge ones, where the system has them; it counts as used page by page,
    as it is written, and goes with its last view."""
    nbytes = max(ALIGN, -(-nbytes // ALIGN) * ALIGN)
    huge = nbytes - nbytes % HUGE_PAGE_BYTES if hasattr(mmap, "MADV_HUGEPAGE") else 0
    # Room to begin at a huge page; what lies before it is never touched, and so takes no memory.
    pages = mmap.mmap(-1, nbytes + (HUGE_PAGE_BYTES if huge else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if not huge:
        return memoryview(pages)
    start = -numpy.frombuffer(pages, dtype=numpy.uint8).ctypes.data % HUGE_PAGE_BYTES
    with contextlib.suppress(OSError):               # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE, start, huge)
    return memoryview(pages)[start : start + nbytes]


class DiskReader:
    """Open files and each thread's small buffer. `direct`: None asks the file system, False never reads directly.

    One DiskReader serves any number of threads. `read_bytes` counts what came from the disk, gaps and alignment included.
    """

    def __init__(self, direct: bool | None = None) -> None:
        self.direct = direct is not False and hasattr(os, "O_DIRECT")
        self._asked = direct
        self._files: dict[Path, tuple[int, bool]] = {}               # descriptor, and whether it reads directly
        self._lock = threading.Lock()
        self._local = threading.local()
        self.read_bytes = 0

    def read(self, chunk: Extent, target: memoryview) -> None:
        """Fills target[chunk.into : + chunk.nbytes]. Raises DiskError."""
        if not chunk.nbytes:
            return
        descriptor, direct = self._opened(chunk.file)
        span = (chunk.rows - 1) * chunk.stride + chunk.row_bytes
        if not direct:
            self._read_cached(descriptor, chunk, span, target)
            return
        start, end = chunk.position, chunk.position + span
        # From the address, not the offset: the buffer's own beginning is a page's.
        if chunk.rows == 1 and start % ALIGN == 0 and chunk.into % ALIGN == 0 and span >= ALIGN:
            aligned = span - span % ALIGN
            self._fill(chunk.file, descriptor, target[chunk.into : chunk.into + aligned], start, aligned)
            if aligned == span:
                return
            chunk = Extent(chunk.file, start + aligned, span - aligned, chunk.into + aligned)
            start, span = chunk.position, chunk.row_bytes
        base = start - start % ALIGN
        room = self._room(-(-(end - base) // ALIGN) * ALIGN)
        self._fill(chunk.file, descriptor, room, base, end - base)
        _spread(room[start - base : start - base + span], chunk, target)

    def _read_cached(self, descriptor: int, chunk: Extent, span: int, target: memoryview) -> None:
        straight = chunk.rows == 1
        room = target[chunk.into : chunk.into + span] if straight else self._room(-(-span // ALIGN) * ALIGN)[:span]
        self._fill(chunk.file, descriptor, room, chunk.position, span)
        if not straight:
            _spread(room, chunk, target)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, chunk.position, span, os.POSIX_FADV_DONTNEED)

    def _fill(self, file: Path, descriptor: int, room: memoryview, position: int, wanted: int) -> None:
        """At least `wanted` bytes from `position` into room; a direct read may stop early at the end of the file."""
        got = 0
        while got < wanted:
            try:
                count = os.preadv(descriptor, [room[got:]], position + got)
            except OSError as error:
                raise DiskError(error.errno, f"reading {file} at byte {position + got} failed: {error.strerror}") from error
            if count <= 0:
                raise DiskError(errno.EIO, f"{file} ends at byte {position + got}, {wanted - got} bytes are missing; "
                                           "it was cut off while in use, fetch it again")
            got += count
        with self._lock:
            self.read_bytes += got

    def _room(self, nbytes: int) -> memoryview:
        held = getattr(self._local, "room", None)
        if held is None or len(held) < nbytes:
            held = self._local.room = buffer(nbytes)
        return held[:nbytes]

    def _opened(self, file: Path) -> tuple[int, bool]:
        found = self._files.get(file)
        if found is None:
            with self._lock:
                found = self._files.get(file)
                if found is None:
                    found = self._files[file] = self._open(file)
        return found

    def _open(self, file: Path) -> tuple[int, bool]:
        try:
            if self.direct:
                descriptor = None
                try:
                    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
                    if not os.fstat(descriptor).st_size or os.preadv(descriptor, [buffer(ALIGN)], 0):
                        return descriptor, True
                except OSError as error:
                    if descriptor is not None:
                        os.close(descriptor)
                    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP) or self._asked:
                        raise
                self.direct = False                                       # a file system without it, such as tmpfs
            return os.open(file, os.O_RDONLY | os.O_CLOEXEC), False
        except OSError as error:
            raise DiskError(error.errno, f"{file} cannot be opened: {error.strerror}") from error

    def close(self) -> None:
        """Closes the files. Nobody may be reading."""
        files, self._files = self._files, {}
        for descriptor, _ in files.values():
            os.close(descriptor)


def _spread(source: memoryview, chunk: Extent, target: memoryview) -> None:
    """The rows of `source`, `stride` apart, side by side into target."""
    if chunk.rows == 1:
        target[chunk.into : chunk.into + chunk.row_bytes] = source
        return
    flat = numpy.frombuffer(source, dtype=numpy.uint8)
    rows = numpy.lib.stride_tricks.as_strided(flat, (chunk.rows, chunk.row_bytes), (chunk.stride, 1), writeable=False)
    place = numpy.frombuffer(target[chunk.into : chunk.into + chunk.nbytes], dtype=numpy.uint8)
    numpy.copyto(place.reshape(chunk.rows, chunk.row_bytes), rows)
