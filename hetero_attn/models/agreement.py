"""Do all ranks mean the same model? Asked once, before weights are read.

Ranks may differ in device, profile and backend, and each reads its own command line and directory. What must not differ (the
architecture, the dtype that travels, where the vocabulary lies) would otherwise show as a hang or as nonsense.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.models.config import DTYPES, ModelConfig, ModelError
from hetero_attn.parallel.sharding import VOCABULARIES, Partition

SITE = "agreement"
_DTYPES = list(DTYPES)


def check_agreement(
    config: ModelConfig, dtype: torch.dtype, vocabulary: str, communicator: Communicator, partitions: tuple[Partition, ...] = (),
    *, streams: bool = False,
) -> None:
    """Raises ModelError, on every rank alike, when the ranks differ in the model, its dtype, its vocabulary or who has what of it.

    partitions: of all ranks; () = the even split, which follows from the rest. streams: whether weights come from the disk.
    """
    if communicator.world_size == 1:
        return
    own = [_digest(config), _DTYPES.index(str(dtype).removeprefix("torch.")), VOCABULARIES.index(vocabulary)]
    own.append(_number([each.parts for each in partitions]) if partitions else 0)
    own.append(int(streams))
    mine = torch.tensor([own], dtype=torch.int64, device=communicator.device)                        # [1, 5]
    ranks = communicator.all_gather(mine, sizes=[1] * communicator.world_size, site=SITE).tolist()
    for rank, theirs in enumerate(ranks):
        if theirs[1] != ranks[0][1]:
            raise ModelError(f"ranks disagree on the dtype: rank 0 has {_DTYPES[ranks[0][1]]}, rank {rank} has {_DTYPES[theirs[1]]} "
                             "(profiles may prefer unlike ones); name one dtype on every rank")
        if theirs[2] != ranks[0][2]:
            raise ModelError(f"ranks disagree on the vocabulary: rank 0 has {VOCABULARIES[ranks[0][2]]!r}, rank {rank} has "
                             f"{VOCABULARIES[theirs[2]]!r} (profiles may prefer unlike ones); name one on every rank")
        if theirs[0] != ranks[0][0]:
            raise ModelError(f"rank {rank} reads another model than rank 0: their config.json differ; give every rank the same model")
        if theirs[3] != ranks[0][3]:
            raise ModelError(f"rank {rank} has another partition of the model than rank 0: take all ranks' folders from one run of "
                             "hetero-attn shard, and give every rank the same hosts")

        if theirs[4] != ranks[0][4]:
            streaming, held = (0, rank) if ranks[0][4] else (rank, 0)
            raise ModelError(f"rank {streaming} streams its weights and rank {held} does not; give every rank a memory budget "
                             "(--memory-budget, or memory_budget in its profile; a large one holds all), or none")


def _digest(config: ModelConfig) -> int:
    """63 bits of everything in the configuration but where it lies on this host's disk."""
    text = "|".join(f"{field.name}={getattr(config, field.name)!r}" for field in fields(config) if field.name != "path")
    return _number(text)


def _number(value: object) -> int:
    return int.from_bytes(hashlib.sha256(str(value).encode()).digest()[:8], "little") >> 1
