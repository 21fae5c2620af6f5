"""Cutting a checkpoint into one folder a rank: read once slice by slice, checksummed as it is written, and resumable.

A file is written under another name and renamed when it is whole; then a line goes into the folder's journal. An export that is started
again keeps the files the journal knows, if the source is the same and their checksums still hold: that is how a damaged slice is mended.
The manifest comes last: a folder with one is complete. Experts that lie fused in one tensor are written as a tensor each, as most
checkpoints have them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.models.config import ModelConfig, ModelError
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.shard_folder import (
    JOURNAL,
    MANIFEST,
    Manifest,
    file_of,
    fingerprint,
    folder_name,
    read_manifest,
    stored_of,
)
from hetero_attn.models.streaming import RUN_ROWS, Layout
from hetero_attn.models.weights import DTYPES, Checkpoint, Entry, check_content, opened_file, shard_entries
from hetero_attn.parallel.disk import ALIGN
from hetero_attn.parallel.sharding import Partition, Shard

CONFIGS = ("config.json", "generation_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Export:
    """What an export has done: the folder, bytes written now and bytes that were there already, of one rank."""

    folder: Path
    written: int
    kept: int


def export(
    path: str | Path, out: str | Path, world_size: int, *, vocabulary: str = "master", ranks: Sequence[int] | None = None,
    partitions: Sequence[Partition] | None = None, progress: Callable[[int, int], None] | None = None,
) -> list[Export]:
    """Writes out/rank-R-of-N for every rank (or those of `ranks`). partitions: who gets what (default: even).

    Raises ModelError for a model that cannot be cut so, a full disk, a folder that cannot be written, or an unfinished export of something
    else in the way.
    """
    config, checkpoint, out = ModelConfig.from_dir(path), Checkpoint(path), Path(out)
    if "lm_head.weight" in checkpoint.entries:
        config = replace(config, tied_embeddings=False)
    try:
        return _export(Path(path), config, checkpoint, out, world_size, vocabulary, ranks, partitions, progress)
    except OSError as error:
        raise ModelError(f"writing {error.filename or out} failed: {error.strerror}; the export goes on from here when it is started "
                         "again, or give --out another place") from None


def _export(path, config, checkpoint, out, world_size, vocabulary, ranks, partitions, progress) -> list[Export]:
    fused = separate_experts(config, checkpoint)
    plans = [_RankPlan(config, checkpoint, fused, rank, world_size, vocabulary, partitions) for rank in
             (range(world_size) if ranks is None else ranks)]
    source = _source(checkpoint, world_size, plans[0].everyone)
    out.mkdir(parents=True, exist_ok=True)
    total, tell = sum(plan.nbytes for plan in plans), progress or (lambda done, total: None)
    journals, done = [], 0
    for plan in plans:                               # what is there already is read whole, which takes its time
        journals.append(_Journal(out / folder_name(plan.rank, world_size), source, config,
                                 lambda kept, before=done: tell(min(before + kept, total), total)))
        done += journals[-1].kept
    free = shutil.disk_usage(out).free
    if total - done > free:
        raise ModelError(f"{out} has {free / 1e9:.1f} GB free, the export needs {(total - done) / 1e9:.1f} GB more; free some, "
                         "choose another disk, or export one rank at a time with --rank")
    tell(min(done, total), total)
    found = []
    for plan, journal in zip(plans, journals):
        written = 0
        for file, shards in plan.files.items():
            if file not in journal.files:
                journal.add(file, plan.write(journal.folder / file, shards))
                written += plan.sizes[file]
                done += plan.sizes[file]
                tell(min(done, total), total)
        journal.finish(plan, path)
        found.append(Export(journal.folder, written, journal.kept))
    return found


class _RankPlan:
    """One rank's files and what goes into each."""

    def __init__(self, config, checkpoint, fused, rank, world_size, vocabulary, partitions) -> None:
        self.config, self.checkpoint, self.rank, self.vocabulary = config, checkpoint, rank, vocabulary
        self._fused: dict[str, tuple[int, int]] = fused
        own = None if partitions is None else partitions[rank]
        decoder = Decoder(config, Communicator(rank, world_size, device="meta"), dtype=torch.float32, device="meta", vocabulary=vocabulary,
                          partition=own)
        sizes = {"q_heads": config.q_heads, "kv_heads": config.kv_heads, "ffn": config.intermediate_size, "vocab": config.vocab_size}
        self.everyone = tuple(partitions or (Partition.of(each, world_size, **sizes, vocabulary=vocabulary) for each in range(world_size)))
        shards = list(decoder.shards(set(checkpoint.entries)))
        checkpoint.check(shards)
        layout = Layout(decoder, checkpoint)
        self.files: dict[str, list[Shard]] = {}
        for shard in shards:
            self.files.setdefault(file_of(shard.name, layout.is_streamed(shard.into))[0], []).append(shard)
        self._keys = {shard.name: file_of(shard.name, layout.is_streamed(shard.into))[1] for shard in shards}
        self.sizes = {file: sum(map(checkpoint.bytes_of, wanted)) for file, wanted in self.files.items()}
        self.nbytes = sum(self.sizes.values())

    def write(self, file: Path, shards: Sequence[Shard]) -> dict:
        """One file, whole or not at all; what the manifest says of it."""
        header, at = {}, 0
        for shard in shards:
            entry, shape = self.checkpoint.entries[shard.name], _stored_shape(shard)
            size = DTYPES[entry.dtype].itemsize * torch.Size(shape).numel()
            header[self._keys[shard.name]] = {"dtype": entry.dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % ALIGN)                        # so that the data begins where direct reads may
        part, tensors = file.with_suffix(".part"), {}
        try:
            with open(part, "wb") as opened:
                opened.write(struct.pack("<Q", len(text)) + text)
                for shard in shards:
                    tensors[shard.name] = self._write_tensor(opened, shard, self.checkpoint.entries[shard.name])
                opened.flush()
                os.fsync(opened.fileno())
            part.rename(file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(file)) from error             # a write's own error names no file
        finally:
            part.unlink(missing_ok=True)
        return {"bytes": file.stat().st_size, "tensors": tensors}

    def _write_tensor(self, opened, shard: Shard, entry: Entry) -> dict:
        shape, checks = _stored_shape(shard), []
        rows = shape[0] if shape else 0
        step = RUN_ROWS if len(shape) > 1 else max(rows, 1)
        own = (*shard.own, *map(range, shard.shape[len(shard.own):]))
        with opened_file(entry.file) as source:
            tensor = source.get_slice(entry.key or shard.name)
            expert, first = self._fused.get(shard.name, (None, 0))
            for start in range(0, rows, step):
                part = range(first + own[0].start + start, first + own[0].start + min(start + step, rows))
                index = tuple(slice(each.start, each.stop) for each in (part, *own[1:]))
                content = tensor[index if expert is None else (slice(expert, expert + 1), *index)].contiguous().view(torch.uint8).numpy()
                checks.append(hashlib.sha256(content).hexdigest())
                opened.write(content)
        return {"key": self._keys[shard.name], "dtype": entry.dtype, "shape": list(shard.shape),
                "stored": stored_of(shard.own, shard.shape), "sha256": checks, "check_rows": step}


def separate_experts(config: ModelConfig, checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Gives a checkpoint whose experts lie fused (mlp.experts.gate_up_proj [E, 2 ffn, C] and down_proj [E, C, ffn]) an entry for each
    expert's w1, w3 and w2 instead, which lie in it one after the other. Each one's (expert, first row) in its fused tensor.

    Raises ModelError for fused tensors of another shape than config.json asks for, and for quantized ones.
    """
    found, ffn, hidden = {}, config.intermediate_size, config.hidden_size
    parts = {"gate_up_proj": (2 * ffn, hidden, (("w1", 0, ffn), ("w3", ffn, ffn))), "down_proj": (hidden, ffn, (("w2", 0, hidden),))}
    for name in [name for name in checkpoint.entries if name.endswith(tuple(f".experts.{each}" for each in parts))]:
        stem, _, fused = name.rpartition(".")
        rows, columns, matrices = parts[fused]
        entry = checkpoint.entries.pop(name)
        if entry.shape != (config.experts, rows, columns):
            raise ModelError(f"{entry.file}: {name} has shape {list(entry.shape)}, config.json asks for {[config.experts, rows, columns]}")
        if entry.dtype not in DTYPES:
            raise ModelError(f"{entry.file}: {name} is {entry.dtype}, expected one of {', '.join(DTYPES)}; "
                             "quantized checkpoints are not supported")
        for expert in range(config.experts):
            for matrix, first, count in matrices:
                own = f"{stem}.{expert}.{matrix}.weight"
                at = entry.offset + (expert * rows + first) * entry.row_bytes // rows
                checkpoint.entries[own] = replace(entry, shape=(count, columns), offset=at, key=name)
                found[own] = expert, first
    return found


def _stored_shape(shard: Shard) -> tuple[int, ...]:
    return tuple(map(len, (*shard.own, *map(range, shard.shape[len(shard.own):]))))


class _Journal:
    """The finished files of a folder, and whether they are of this source."""

    def __init__(self, folder: Path, source: str, config: ModelConfig, progress: Callable[[int], None]) -> None:
        self.folder, self.source, self.files, self.kept, self._progress = folder, source, {}, 0, progress
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / JOURNAL
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder, config)
            mark = json.loads((folder / MANIFEST).read_text()).get("source")
            if mark != source:
                raise ModelError(f"{folder} holds an export of another source or partition; delete it, or choose another --out")
            self._keep(manifest.files)
            return
        if self._file.exists():
            lines = _lines(self._file)
            if not lines or lines[0] != {"source": source}:
                raise ModelError(f"{folder} holds an unfinished export of another source or partition; delete it, or choose another --out")
            for line in lines[1:]:
                self._keep(line)
            self._begin()                            # without what was cut off at its end
            return
        if any(folder.iterdir()):
            raise ModelError(f"{folder} is not empty and no export; choose another --out")
        self._begin()

    def _begin(self) -> None:
        lines = [{"source": self.source}, *({name: facts} for name, facts in self.files.items())]
        _whole(self._file, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def _keep(self, files: dict) -> None:
        for name, facts in files.items():
            if _intact(self.folder, name, facts):
                self.files[name] = facts
                self.kept += facts["bytes"]
                self._progress(self.kept)

    def add(self, name: str, facts: dict) -> None:
        self.files[name] = facts
        if not self._file.exists():
            self._begin()
            return
        with open(self._file, "a") as opened:
            opened.write(json.dumps({name: facts}) + "\n")

    def finish(self, plan: _RankPlan, path: Path) -> None:
        """Copies the configuration (and, with the vocabulary's first rank, the tokenizer) and writes the manifest."""
        for name in CONFIGS + (TOKENIZER if plan.rank == 0 else ()):
            if (path / name).is_file():
                _whole(self.folder / name, (path / name).read_bytes())
        manifest = Manifest(plan.rank, len(plan.everyone), plan.vocabulary, plan.config.tied_embeddings, fingerprint(plan.config),
                            plan.everyone, self.files)
        content = json.loads(manifest.to_json()) | {"source": self.source}
        _whole(self.folder / MANIFEST, json.dumps(content, indent=1).encode())
        self._file.unlink(missing_ok=True)


def _intact(folder: Path, name: str, facts: dict) -> bool:
    """Whether a file is there and holds what its export wrote: all of it is read."""
    try:
        found = shard_entries(folder, {name: facts})
        with opened_file(folder / name) as opened:
            for tensor, entry in found.items():
                check_content(opened, tensor, entry)
    except ModelError:
        return False
    return True


def _lines(file: Path) -> list[dict]:
    """A journal's whole lines; the last may have been cut off as it was written, and its file is then made again."""
    found = []
    for line in file.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _whole(file: Path, content: bytes) -> None:
    """Writes a small file whole or not at all. Raises OSError that names it."""
    part = file.with_name(f"{file.name}.part")
    try:
        with open(part, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())                # the name must not outlive a power cut that the content did not
        part.rename(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        part.unlink(missing_ok=True)


def _source(checkpoint: Checkpoint, world_size: int, everyone: Sequence[Partition]) -> str:
    """What an export is made of: the checkpoint's files by name, size and time, and who gets what."""
    files = sorted({entry.file for entry in checkpoint.entries.values()})
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((facts, world_size, tuple(everyone))).encode()).hexdigest()


def check(folder: Path, progress: Callable[[int, int], None] | None = None) -> int:
    """Reads a rank's folder whole and compares every checksum; bytes read. Raises ModelError for what is damaged, missing or cut off."""
    checkpoint = Checkpoint(folder)
    if checkpoint.manifest is None:
        raise ModelError(f"{folder} is no rank's folder: it has no {MANIFEST}")
    done, total = 0, sum(facts["bytes"] for facts in checkpoint.manifest.files.values())
    for name, entry in checkpoint.entries.items():
        with opened_file(entry.file) as opened:
            check_content(opened, name, entry)
        done += entry.row_bytes * entry.stored_shape[0] if entry.stored_shape else 0
        if progress is not None:
            progress(done, max(total, done))
    return done
