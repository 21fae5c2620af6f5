"""load_model: from a Hugging Face directory to one rank's decoder, ready to run.

Everything that can be wrong with the request is found before anything is allocated or read, and on every rank alike, so that a bad
directory or world size is one line from each rank and not a rank waiting for another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.models.agreement import check_agreement
from hetero_attn.models.budget import Room, stream
from hetero_attn.models.calibration import share_calibration
from hetero_attn.models.config import DTYPES, ModelConfig, ModelError
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.placing import check_placement, make_placing, plan_command
from hetero_attn.models.schedule_setup import make_schedule
from hetero_attn.models.shard_folder import rank_folder, refuse_unfinished
from hetero_attn.models.weights import Checkpoint, log
from hetero_attn.parallel.placement import DeviceMemoryError, out_of_memory_text
from hetero_attn.parallel.sharding import VOCABULARIES, Partition
from hetero_attn.profile import DeviceProfile, load_profile
from hetero_attn.quantity import parse_bytes
from hetero_attn.registry import linear_backend, norm_backend

CACHE_TOKENS = 2048             # that a memory budget leaves room for, unless the caller knows


def load_model(
    path: str | Path,
    profile: str | Path | DeviceProfile | None = None,
    tp: int | None = None,
    *,
    communicator: Communicator | None = None,
    dtype: torch.dtype | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    vocabulary: str | None = None,
    memory_budget: int | str | None = None,
    window: int | None = None,
    cache_tokens: int | None = None,
    cache_sequences: int = 1,
    partitions: Sequence[Partition] | None = None,
) -> Decoder:
    """This rank's part of the model in `path` (config.json, *.safetensors), or in what `hetero-attn shard` wrote (a rank's folder, or
    the one above it).

    profile     a shipped name, a YAML file, a DeviceProfile, or None to detect the device
    tp          tensor-parallel size; None takes the communicator's world size, another number must equal it
    communicator  None: made from torchrun's environment, a world of one without it; the decoder holds it (decoder.communicator)
    dtype       torch.dtype, its name or 'auto'; None: the profile's, whose 'auto' is the checkpoint's. Slices are cast one by one
    progress    called with (done_bytes, total_bytes) of this rank's own slices
    vocabulary  'sharded' or 'master'; None: the profile's
    memory_budget  of this whole process, bytes or '3GiB': weights that do not fit are streamed from the disk for every token; None: the
                profile's, without which all weights are held. decoder.memory is then the plan (models/budget.py)
    window      blocks (attention or MLP of a layer) that the streaming window holds; None: the profile's, else what is quickest
    cache_tokens, cache_sequences  what the budget must leave room for in the KV cache (default: 2048 tokens or the context, one sequence)
    partitions  who gets which heads, columns and rows, one a rank (parallel/partition.py); None: evenly, or as the folder was cut

    Raises ModelError (one line: what was found, what was expected, what to do), ProfileError, CommunicatorError.
    """
    if communicator is not None:
        world_size, rank = communicator.world_size, communicator.rank
    else:
        world_size, rank = tp or int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    named, path = Path(path).resolve().name, rank_folder(path, rank, world_size)
    config, checkpoint = open_model(path)
    profile = load_profile(profile, world_size=world_size, model=named)     # whose tuned overlay to lay over it
    chosen = _dtype(dtype if dtype is not None else profile.dtype, config, checkpoint)
    vocabulary = vocabulary or (checkpoint.manifest or profile).vocabulary
    if vocabulary not in VOCABULARIES:
        raise ModelError(f"vocabulary is {vocabulary!r}, expected one of {', '.join(VOCABULARIES)}")
    partition = own_partition(checkpoint, rank, world_size, vocabulary, partitions)
    if checkpoint.manifest is None:
        # the whole model's tensors, on no memory: a fault in a part that only some ranks read must stop all of them
        checkpoint.check(Decoder(config, Communicator(0, 1), dtype=chosen, device="meta").shards(set(checkpoint.entries)))
    budget, blocks = _budget(memory_budget, profile), window or profile.window
    streams = budget is not None or blocks is not None
    asked, limit = check_placement(profile, config, streams=streams)
    made = communicator is None
    if made:
        from hetero_attn.collectives import init_communicator  # torch.distributed, which a given communicator may do without

        communicator = init_communicator(profile)
    try:
        if tp is not None and tp != communicator.world_size:
            raise ModelError(f"tp is {tp}, but {communicator.world_size} ranks are running; start the program with "
                             f"torchrun --nproc-per-node={tp}, or leave tp out")
        if streams and communicator.device.type != "cpu":
            raise ModelError(f"a memory budget streams weights to the cpu's memory, this rank runs on {communicator.device}; "
                             "a group with such a rank must leave --memory-budget and window out")
        check_agreement(config, chosen, vocabulary, communicator, everyone(config, checkpoint, partitions), streams=streams)
        share_calibration(profile, config, communicator)
        made_on = "meta" if streams else communicator.device
        try:
            decoder = Decoder(
                config, communicator, dtype=chosen, device=made_on, vocabulary=vocabulary,
                kv_block_size=profile.kv_block_size, profile=profile, partition=partition,
            )
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"rank {rank} has no room for its weights ({out_of_memory_text(error)}); how many ranks it takes: "
                + plan_command(path, profile, world_size, cache_tokens or min(CACHE_TOKENS, config.context_length), limit)) from error
        decoder.use_backend(linear_backend(profile), norm_backend(profile))
        shards = list(decoder.shards(set(checkpoint.entries)))
        if streams:
            room = Room(budget, blocks, cache_tokens or min(CACHE_TOKENS, config.context_length), cache_sequences, profile.prefill_chunk)
            stream(decoder, checkpoint, room, communicator.device, progress)
        else:
            checkpoint.load(shards, progress)
        decoder.schedule = make_schedule(decoder, profile)
        if not streams:
            decoder.placing = make_placing(decoder, profile, asked, limit)
    except BaseException:
        if made:
            communicator.close()
        raise
    if communicator.rank == 0 and checkpoint.manifest is None:
        unused = checkpoint.unused(shards)
        if unused:
            log.warning("%s: %d tensors belong to nothing in this architecture and are not used, for example %s",
                        path, len(unused), unused[0])
    return decoder.eval()


def open_model(path: Path) -> tuple[ModelConfig, Checkpoint]:
    """A model's directory or a rank's folder: what config.json says, and the tensors by name. Raises ModelError."""
    refuse_unfinished(path)
    config, checkpoint = ModelConfig.from_dir(path), Checkpoint(path)
    if checkpoint.manifest is not None:
        config = replace(config, tied_embeddings=checkpoint.manifest.tied)
    elif "lm_head.weight" in checkpoint.entries:                  # a head of its own may differ, whatever config.json says of tying
        config = replace(config, tied_embeddings=False)
    return config, checkpoint


def own_partition(
    checkpoint: Checkpoint, rank: int, world_size: int, vocabulary: str, partitions: Sequence[Partition] | None = None
) -> Partition | None:
    """What a rank's folder or the caller says that this rank has; None: the even split. Raises ModelError where the two do not fit."""
    manifest = checkpoint.manifest
    if manifest is None:
        return None if partitions is None else partitions[rank]
    if (manifest.rank, manifest.world_size) != (rank, world_size):
        raise ModelError(f"{checkpoint.path} is for rank {manifest.rank} of {manifest.world_size}, this is rank {rank} of {world_size}; "
                         "give each rank its own folder, or the one above it")
    if manifest.vocabulary != vocabulary:
        raise ModelError(f"{checkpoint.path} was cut for vocabulary {manifest.vocabulary!r}, asked for is {vocabulary!r}; "
                         f"leave --vocabulary out, or run hetero-attn shard --vocabulary {vocabulary}")
    if partitions is not None and tuple(partitions) != manifest.partitions:
        raise ModelError(f"{checkpoint.path} was cut for another partition than is asked for; run hetero-attn shard with the same hosts")
    return manifest.partitions[rank]


def everyone(config: ModelConfig, checkpoint: Checkpoint, partitions: Sequence[Partition] | None) -> tuple[Partition, ...]:
    """The partition of all ranks where it is not the even one, else (): a rank may read the whole checkpoint and another its folder."""
    every = checkpoint.manifest.partitions if checkpoint.manifest is not None else tuple(partitions or ())
    sizes = {"q_heads": config.q_heads, "kv_heads": config.kv_heads, "ffn": config.intermediate_size, "vocab": config.vocab_size}
    even = tuple(Partition.of(each.rank, each.world_size, **sizes, vocabulary=each.vocabulary) for each in every)
    return () if [each.parts for each in every] == [each.parts for each in even] else every


def _budget(asked: int | str | None, profile: DeviceProfile) -> int | None:
    asked = asked if asked is not None else profile.memory_budget
    if not isinstance(asked, str):
        return asked
    try:
        return parse_bytes(asked)
    except ValueError as error:
        raise ModelError(f"memory budget {error}") from None


def _dtype(asked: torch.dtype | str, config: ModelConfig, checkpoint: Checkpoint) -> torch.dtype:
    if asked == "auto":
        asked = config.dtype or checkpoint.dtype
    name = str(asked).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"dtype is {name}, expected auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]
