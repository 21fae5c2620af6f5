"""A folder with config.json alone, for planning: what the weights would be, by the decoder's own account of what it reads.

So that a model can be planned for before it is fetched, or where nobody has published it but its shape is known.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from hetero_attn.communicator import Communicator
from hetero_attn.models.config import ModelConfig
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.load import open_model
from hetero_attn.models.weights import DTYPES, Checkpoint, Entry

CODES = {dtype: code for code, dtype in DTYPES.items()}


def open_sizes(path: Path) -> tuple[ModelConfig, Checkpoint, tuple[str, ...]]:
    """The model's config, its tensors' sizes, and what to know of them. Raises ModelError."""
    files = list(path.iterdir()) if path.is_dir() else []
    if not any(file.name == "config.json" for file in files) or len({file.suffix for file in files} - {".json", ".md"}):
        return *open_model(path), ()
    config = ModelConfig.from_dir(path)
    dtype = config.dtype or torch.bfloat16
    whole = Decoder(config, Communicator(0, 1, device="meta"), dtype=dtype, device="meta")
    entries = {shard.name: Entry(path / "config.json", CODES[dtype], shard.shape, 0) for shard in whole.shards(set())}
    return replace(config, dtype=dtype), Checkpoint.of_entries(path, entries), (f"{path} holds no weights: their sizes follow from its "
                                                                             "config.json",)
