"""A rank's own folder: the slices of one rank and nothing else, which is all that a worker needs on its disk.

    rank-1-of-4/shard.json                      what is here: tensors, slices, checksums, everybody's partition; written last
    rank-1-of-4/layer-000.attention.safetensors q, k, v and o of one layer, in the order they are used, so that a block is one read
    rank-1-of-4/layer-000.mlp.safetensors       gate, up and down (or the experts)
    rank-1-of-4/held.safetensors                norms, biases, routers
    rank-0-of-4/embedding.safetensors, head.safetensors, tokenizer.json: with the rank that has the vocabulary

Tensors in a layer's file are named within the layer, so files of equal layers are interchangeable. No pickle anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetero_attn.models.config import ModelConfig, ModelError, read_json
from hetero_attn.parallel.sharding import VOCABULARIES, Partition

MANIFEST, FORMAT, VERSION = "shard.json", "hetero_attn shard", 1
JOURNAL = "export.jsonl"        # a line for each finished file of an export that is under way
PARTS = ("q_heads", "kv_heads", "ffn", "vocab")
LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
BLOCKS = {"self_attn": "attention", "mlp": "mlp", "block_sparse_moe": "mlp"}


def folder_name(rank: int, world_size: int) -> str:
    return f"rank-{rank}-of-{world_size}"


def rank_folder(path: str | Path, rank: int, world_size: int) -> Path:
    """`path` itself, or the folder of this rank in it where `hetero-attn shard` has written there. Raises ModelError for another number."""
    path = Path(path)
    if (path / "config.json").exists() or not path.is_dir():
        return path
    own = path / folder_name(rank, world_size)
    if own.is_dir():
        return own
    found = sorted(each.name for each in path.glob("rank-*-of-*") if each.is_dir())
    if not found:
        return path
    sizes = sorted({int(name.rpartition("-")[2]) for name in found if name.rpartition("-")[2].isdigit()})
    if world_size in sizes:
        raise ModelError(f"{path} has {', '.join(found)} and not {own.name}; copy that folder here, it is all this rank needs")
    raise ModelError(f"{path} holds slices for {' or '.join(map(str, sizes))} ranks, and {world_size} are running; start as many, "
                     f"or run hetero-attn shard MODEL --tp {world_size}")


def file_of(name: str, streamed: bool) -> tuple[str, str]:
    """(file, name of the tensor in it) for a tensor of the checkpoint. streamed: it goes through the weight window."""
    if name == "model.embed_tokens.weight":
        return "embedding.safetensors", name
    if name == "lm_head.weight":
        return "head.safetensors", name
    found = LAYER.fullmatch(name)
    if not streamed or found is None:
        return "held.safetensors", name
    return f"layer-{int(found[1]):03d}.{BLOCKS.get(found[2].partition('.')[0], 'other')}.safetensors", found[2]


@dataclass(frozen=True)
class Manifest:
    """shard.json, checked. files: name -> {bytes, tensors: {name -> key, dtype, shape, stored, sha256, check_rows}}."""

    rank: int
    world_size: int
    vocabulary: str
    tied: bool
    model: str                                      # fingerprint of the configuration
    partitions: tuple[Partition, ...]
    files: dict[str, Any]

    def to_json(self) -> str:
        ranks = [{part: [getattr(each, part).start, getattr(each, part).stop] for part in PARTS}
                 for each in self.partitions]
        return json.dumps({"format": FORMAT, "version": VERSION, "rank": self.rank, "world_size": self.world_size, "model": self.model,
                           "vocabulary": self.vocabulary, "tied": self.tied, "ranks": ranks, "files": self.files}, indent=1)


def refuse_unfinished(folder: Path) -> None:
    """Raises ModelError for a folder whose export is not complete."""
    if (folder / JOURNAL).exists() and not (folder / MANIFEST).exists():
        raise ModelError(f"{folder} is an unfinished export; run the same hetero-attn shard again, it goes on where it stopped")


def read_manifest(folder: Path, config: ModelConfig) -> Manifest | None:
    """The manifest of a rank's folder, None for any other folder. Raises ModelError for a damaged or foreign one."""
    file = folder / MANIFEST
    if not file.exists():
        return None
    found = read_json(file)
    try:
        if found["format"] != FORMAT or found["version"] != VERSION:
            raise ModelError(f"{file} is {found['format']!r} version {found['version']}, expected {FORMAT!r} version {VERSION}; "
                             "export again")
        world_size = int(found["world_size"])
        sharded = found["vocabulary"] == "sharded"
        rows = tuple(each["vocab"][1] - each["vocab"][0] for each in found["ranks"]) if sharded else ()
        partitions = tuple(
            Partition(rank, world_size, found["vocabulary"], *(range(*each[part]) for part in PARTS), rows)
            for rank, each in enumerate(found["ranks"])
        )
        manifest = Manifest(int(found["rank"]), world_size, found["vocabulary"], bool(found["tied"]), found["model"],
                            partitions, dict(found["files"]))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file} is damaged ({type(error).__name__}: {error}); copy the folder again") from None
    if len(partitions) != world_size or not 0 <= manifest.rank < world_size or manifest.vocabulary not in VOCABULARIES:
        raise ModelError(f"{file} is damaged: rank {manifest.rank} of {world_size}, {len(partitions)} partitions; copy the folder again")
    if manifest.model != fingerprint(config):
        raise ModelError(f"{folder}: config.json is not that of the export; copy the folder again")
    return manifest


def fingerprint(config: ModelConfig) -> str:
    """A name for the sizes that slices depend on."""
    sizes = (config.model_type, config.vocab_size, config.hidden_size, config.intermediate_size, config.layers, config.q_heads,
             config.kv_heads, config.head_dim, config.experts)
    return "-".join(map(str, sizes))


def stored_of(own: Sequence[range], shape: Sequence[int]) -> list[list[int]]:
    """A slice as the manifest holds it: [start, stop] of every dimension."""
    ranges = [*own, *map(range, shape[len(own):])]
    return [[each.start, each.stop] if len(each) else [0, 0] for each in ranges]
