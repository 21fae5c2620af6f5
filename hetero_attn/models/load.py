"""load_model: from a Hugging Face directory to one rank's decoder, ready to run.

Everything that can be wrong with the request is found before anything is allocated or read, and on every rank alike, so that a bad
directory or world size is one line from each rank and not a rank waiting for another.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.models.agreement import check_agreement
from hetero_attn.models.calibration import share_calibration
from hetero_attn.models.config import DTYPES, ModelConfig, ModelError
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.schedule_setup import make_schedule
from hetero_attn.models.weights import Checkpoint, log
from hetero_attn.parallel.sharding import VOCABULARIES
from hetero_attn.profile import DeviceProfile, load_profile
from hetero_attn.registry import linear_backend


def load_model(
    path: str | Path,
    profile: str | Path | DeviceProfile | None = None,
    tp: int | None = None,
    *,
    communicator: Communicator | None = None,
    dtype: torch.dtype | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    vocabulary: str | None = None,
) -> Decoder:
    """This rank's part of the model in `path` (config.json, *.safetensors).

    profile     a shipped name, a YAML file, a DeviceProfile, or None to detect the device
    tp          tensor-parallel size; None takes the communicator's world size, another number must equal it
    communicator  None: made from torchrun's environment, a world of one without it; the decoder holds it (decoder.communicator)
    dtype       torch.dtype, its name or 'auto'; None: the profile's, whose 'auto' is the checkpoint's. Slices are cast one by one
    progress    called with (done_bytes, total_bytes) of this rank's own slices
    vocabulary  'sharded' or 'master'; None: the profile's

    Raises ModelError (one line: what was found, what was expected, what to do), ProfileError, CommunicatorError.
    """
    config = ModelConfig.from_dir(path)
    checkpoint = Checkpoint(path)
    if "lm_head.weight" in checkpoint.entries:                    # a head of its own may differ, whatever config.json says of tying
        config = replace(config, tied_embeddings=False)
    if communicator is not None:
        world_size = communicator.world_size
    else:
        world_size = tp or int(os.environ.get("WORLD_SIZE", "1"))
    profile = load_profile(profile, world_size=world_size, model=config.path.resolve().name)     # whose tuned overlay to lay over it
    chosen = _dtype(dtype if dtype is not None else profile.dtype, config, checkpoint)
    vocabulary = vocabulary or profile.vocabulary
    if vocabulary not in VOCABULARIES:
        raise ModelError(f"vocabulary is {vocabulary!r}, expected one of {', '.join(VOCABULARIES)}")
    # the whole model's tensors, on no memory: a fault in a part that only some ranks read must stop all of them
    checkpoint.check(Decoder(config, Communicator(0, 1), dtype=chosen, device="meta").shards(set(checkpoint.entries)))
    made = communicator is None
    if made:
        from hetero_attn.collectives import init_communicator  # torch.distributed, which a given communicator may do without

        communicator = init_communicator(profile)
    try:
        if tp is not None and tp != communicator.world_size:
            raise ModelError(f"tp is {tp}, but {communicator.world_size} ranks are running; start the program with "
                             f"torchrun --nproc-per-node={tp}, or leave tp out")
        check_agreement(config, chosen, vocabulary, communicator)
        share_calibration(profile, config, communicator)
        decoder = Decoder(
            config, communicator, dtype=chosen, device=communicator.device, vocabulary=vocabulary,
            kv_block_size=profile.kv_block_size, profile=profile,
        )
        decoder.use_backend(linear_backend(profile))
        shards = list(decoder.shards(set(checkpoint.entries)))
        checkpoint.load(shards, progress)
        decoder.schedule = make_schedule(decoder, profile)
    except BaseException:
        if made:
            communicator.close()
        raise
    if communicator.rank == 0:
        unused = checkpoint.unused(shards)
        if unused:
            log.warning("%s: %d tensors belong to nothing in this architecture and are not used, for example %s",
                        path, len(unused), unused[0])
    return decoder.eval()


def _dtype(asked: torch.dtype | str, config: ModelConfig, checkpoint: Checkpoint) -> torch.dtype:
    if asked == "auto":
        asked = config.dtype or checkpoint.dtype
    name = str(asked).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"dtype is {name}, expected auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]
