"""Reading a rank's slices from safetensors, one file or many, without ever holding a whole checkpoint.

Headers are read and checked first (they are small, and every mistake shows there: a truncated file, a missing tensor, a wrong shape or
dtype), so that a bad checkpoint fails at once and by name. Then each slice is copied out of the mapped file into its parameter, and
cast on the way: what a rank holds besides its parameters is one slice's pages.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hetero_attn.models.config import ModelConfig, ModelError
from hetero_attn.models.shard_folder import MANIFEST, Manifest, read_manifest
from hetero_attn.parallel.sharding import Shard

log = logging.getLogger("hetero_attn")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HEADER_LIMIT = 100_000_000                     # bytes, the format's own
# tensors that older checkpoints carry and no decoder needs: they follow from the config
DERIVED = (".rotary_emb.inv_freq", ".self_attn.masked_bias", ".self_attn.bias")


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint: its file, the format's dtype name, the whole tensor's shape, and the byte of the file where it begins.

    stored: the part of it that the file has, a range a dimension; () = all of it. key: its name there, where that is another. checks:
    sha256 of every check_rows stored rows.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    stored: tuple[range, ...] = ()
    checks: tuple[str, ...] = ()
    check_rows: int = 0
    key: str = ""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.stored)) if self.stored else self.shape

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored row."""
        return DTYPES[self.dtype].itemsize * torch.Size(self.stored_shape[1:]).numel()

    def within(self, own: Sequence[range]) -> tuple[range, ...]:
        """The slice `own` of the whole tensor as a slice of what is stored. Raises ModelError where it is not all there."""
        if not self.stored:
            return tuple(own)
        own = (*own, *map(range, self.shape[len(own):]))
        for wanted, held in zip(own, self.stored):
            if len(wanted) and not (held.start <= wanted.start and wanted.stop <= held.stop):
                raise ModelError(f"{self.file} holds {held.start} to {held.stop} of a tensor, {wanted.start} to {wanted.stop} are asked "
                                 "for; start as many ranks as the folder was made for")
        return tuple(range(wanted.start - held.start, wanted.stop - held.start) if len(wanted) else range(0)
                     for wanted, held in zip(own, self.stored))

    def checked_rows(self) -> Iterator[tuple[int, int, str]]:
        """(first row, past the last, sha256) of what has a checksum of its own."""
        rows = self.stored_shape[0]
        for number, digest in enumerate(self.checks):
            yield number * self.check_rows, min((number + 1) * self.check_rows, rows), digest


class Checkpoint:
    """The tensors of a model directory, by name; opening it reads headers only. Raises ModelError."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        self.manifest: Manifest | None = None                            # of a rank's own folder
        self._checked: set[str] = set()
        index = self.path / INDEX
        if (self.path / MANIFEST).exists():
            self.manifest = read_manifest(self.path, ModelConfig.from_dir(self.path))
            self.entries = shard_entries(self.path, self.manifest.files)
        elif index.exists():
            placed = _weight_map(index)
            for name in sorted(set(placed.values())):
                self.entries.update(read_header(self.path / name))
            absent = sorted(set(placed) - set(self.entries))
            if absent:
                raise ModelError(f"{index} promises {_some(absent)}, which {placed[absent[0]]} does not hold; fetch the checkpoint again")
        elif (self.path / SINGLE).exists():
            self.entries.update(read_header(self.path / SINGLE))
        else:
            others = sorted(file.name for file in self.path.glob("*.bin"))
            remedy = f"{others[0]} is a pickle: convert it to safetensors" if others else "expected that file, or several and an index"
            raise ModelError(f"{self.path} has no {SINGLE} ({remedy})")

    @classmethod
    def of_entries(cls, path: Path, entries: dict[str, Entry]) -> Checkpoint:
        """Tensors that lie in no file, to be measured and not loaded."""
        found = cls.__new__(cls)
        found.path, found.entries, found.manifest, found._checked = path, entries, None, set()
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the checkpoint's bytes, among those a model can have. Raises ModelError when it has none of them."""
        held: dict[str, int] = defaultdict(int)
        for entry in self.entries.values():
            held[entry.dtype] += torch.Size(entry.shape).numel()
        known = {name: count for name, count in held.items() if name in DTYPES}
        if not known:
            raise ModelError(f"{self.path}: the tensors are {', '.join(sorted(held)) or 'missing'}, expected one of {', '.join(DTYPES)}")
        return DTYPES[max(known, key=known.get)]

    def bytes_of(self, shard: Shard) -> int:
        """What the shard takes in the checkpoint."""
        return shard.into.numel() * DTYPES[self.entries[shard.name].dtype].itemsize

    def check(self, shards: Iterable[Shard]) -> None:
        """Raises ModelError when a tensor is missing, or has another shape or an unusable dtype."""
        shards = list(shards)
        missing = sorted({shard.name for shard in shards} - set(self.entries))
        if missing:
            raise ModelError(f"{self.path} lacks {_some(missing)}, which its config.json asks for; "
                             "the checkpoint is incomplete, or another model's")
        for shard in shards:
            entry = self.entries[shard.name]
            if entry.shape != shard.shape:
                raise ModelError(f"{entry.file}: {shard.name} has shape {list(entry.shape)}, config.json asks for {list(shard.shape)}")
            if entry.dtype not in DTYPES:
                raise ModelError(f"{entry.file}: {shard.name} is {entry.dtype}, expected one of {', '.join(DTYPES)}; "
                                 "quantized checkpoints are not supported")

    def unused(self, shards: Iterable[Shard]) -> list[str]:
        """Tensors of the checkpoint that no shard asks for and that are not known to follow from the config."""
        return sorted(name for name in set(self.entries) - {shard.name for shard in shards} if not name.endswith(DERIVED))

    def load(self, shards: Iterable[Shard], progress: Callable[[int, int], None] | None = None) -> int:
        """Fills every shard's memory, reading its slice alone; returns the bytes read. progress(done_bytes, total_bytes) as it goes."""
        shards = list(shards)
        self.check(shards)
        done, total = 0, sum(map(self.bytes_of, shards))
        by_file: dict[Path, list[Shard]] = defaultdict(list)
        for shard in sorted(shards, key=lambda shard: self.entries[shard.name].offset):         # in the order of the disk
            by_file[self.entries[shard.name].file].append(shard)
        if progress is not None:
            progress(0, total)
        for file, wanted in by_file.items():
            with opened_file(file) as opened:
                for shard in wanted:
                    self._copy(opened, shard)
                    done += self.bytes_of(shard)
                    if progress is not None:
                        progress(done, total)
        return done

    @torch.no_grad()
    def _copy(self, opened, shard: Shard) -> None:
        """The one place that touches weights: a view of the mapped file, copied (cast, moved to the device) into the parameter."""
        entry = self.entries[shard.name]
        if entry.checks and shard.name not in self._checked:
            self._checked.add(shard.name)
            check_content(opened, shard.name, entry)
        if shard.into.numel():
            own = tuple(slice(part.start, part.stop) for part in entry.within(shard.own))
            shard.into.copy_(opened.get_slice(entry.key or shard.name)[own or slice(None)])


def check_content(opened, name: str, entry: Entry) -> None:
    """Raises ModelError when a tensor's bytes are not those its checksums were made of. opened: its file, from opened_file()."""
    tensor = opened.get_slice(entry.key or name)
    for start, stop, digest in entry.checked_rows():
        if hashlib.sha256(tensor[start:stop].contiguous().view(torch.uint8).numpy()).hexdigest() != digest:
            raise ModelError(f"{entry.file} is damaged: the checksum of {name} is not that of its export; "
                             "copy the folder again, or run hetero-attn shard again")


def shard_entries(folder: Path, files: Mapping[str, dict]) -> dict[str, Entry]:
    """The tensors of a rank's folder, after a look at every file's size and header. files: a manifest's. Raises ModelError."""
    found: dict[str, Entry] = {}
    for name, facts in files.items():
        file = folder / name
        headers = read_header(file)
        if file.stat().st_size != facts["bytes"]:
            raise ModelError(f"{file} has {file.stat().st_size} bytes, its export wrote {facts['bytes']}; copy the folder again")
        for tensor, info in facts["tensors"].items():
            stored, header = tuple(range(*each) for each in info["stored"]), headers.get(info["key"])
            if header is None or header.shape != tuple(map(len, stored)) or header.dtype != info["dtype"]:
                raise ModelError(f"{file} does not hold {tensor} as {MANIFEST} says; copy the folder again")
            found[tensor] = replace(header, shape=tuple(info["shape"]), stored=stored, checks=tuple(info["sha256"]),
                                    check_rows=info["check_rows"], key=info["key"])
    return found


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, after checking that the file is as long as its header says. Raises ModelError."""
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8).ljust(8, b"\xff"))
            if length > HEADER_LIMIT or 8 + length > size:
                raise ModelError(f"{file} is not a whole safetensors file ({size} bytes, header cut off or not one); fetch the file again")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        entries = {name: Entry(file, info["dtype"], tuple(info["shape"]), 8 + length + info["data_offsets"][0])
                   for name, info in header.items()}
        end = 8 + length + max((info["data_offsets"][1] for info in header.values()), default=0)
    except FileNotFoundError:
        raise ModelError(f"{file} does not exist, and the checkpoint needs it; fetch the checkpoint again") from None
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file} has a corrupt safetensors header ({type(error).__name__}: {error}); fetch the file again") from None
    if end != size:
        state = "truncated" if size < end else "longer than it should be"
        raise ModelError(f"{file} is {state}: {size} bytes, its header describes {end}; fetch the file again")
    with opened_file(file):                        # the format's own reader checks the rest: known dtypes, offsets without gap or overlap
        return entries


@contextmanager
def opened_file(file: Path) -> Iterator:
    """The file as the format's own reader maps it; what that reader objects to becomes a ModelError. An OSError of the block is its own."""
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} cannot be read: {error}; fetch the file again") from None
        try:
            yield opened
        except SafetensorError as error:
            raise ModelError(f"{file} cannot be read: {error}; fetch the file again") from None


def _weight_map(index: Path) -> dict[str, str]:
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if placed and all(isinstance(name, str) and Path(name).name == name for name in placed.values()):
            return placed
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ModelError(f"{index} is corrupt: expected a JSON object with weight_map, tensor name to file name; fetch the file again")


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"
