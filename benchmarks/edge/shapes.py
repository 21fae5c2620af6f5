"""The shapes of published models, and checkpoints of random weights in them: nobody needs 13 GB of a download to measure a disk.

Values are drawn once for 64 MiB and laid over the tensors from changing places, which is as random as speed and memory can tell. Written
tensor by tensor, in the layer order of a Hugging Face checkpoint, one file; the folder runs with `hetero-attn generate`.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
         "torch_dtype": "bfloat16", "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 4096}
SHAPES = {
    "tiny": {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 4},
    "llama-1b": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                 "num_key_value_heads": 4},
    "llama2-7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 32},
    "llama2-70b": {"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                   "num_key_value_heads": 8},
}
TILE = 64 << 20                 # bytes drawn
ROOT = Path(__file__).parents[2]


def config(name: str) -> dict:
    """config.json of a shape. Raises ValueError for an unknown one."""
    if name not in SHAPES:
        raise ValueError(f"shape {name!r} is not known, expected one of {', '.join(SHAPES)}")
    return LLAMA | SHAPES[name]


def tensors(keys: dict, layers: int | None = None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor, in file order. layers: fewer than the config has."""
    hidden, ffn, vocab = keys["hidden_size"], keys["intermediate_size"], keys["vocab_size"]
    kv = hidden // keys["num_attention_heads"] * keys["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(keys["num_hidden_layers"] if layers is None else layers):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        for name, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden)):
            yield f"{prefix}self_attn.{name}.weight", (rows, hidden)
        for name, shape in (("gate_proj", (ffn, hidden)), ("up_proj", (ffn, hidden)), ("down_proj", (hidden, ffn))):
            yield f"{prefix}mlp.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def nbytes(name: str, layers: int | None = None) -> int:
    """Bytes of a shape's weights."""
    return sum(2 * math.prod(shape) for _, shape in tensors(config(name), layers))


def write(folder: Path, name: str, *, layers: int | None = None, progress: Callable[[int, int], None] | None = None) -> Path:
    """A checkpoint of that shape in `folder`, with a tokenizer. layers: only so many are written (and config.json says so).

    Raises OSError where the disk is full; nothing is left then.
    """
    keys = config(name) | ({} if layers is None else {"num_hidden_layers": layers})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys, indent=1))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples" / "tiny-llama" / file, folder / file)
    placed, end = {}, 0
    for tensor, shape in tensors(keys):
        size = 2 * math.prod(shape)
        placed[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(placed).encode()
    header += b" " * (-(8 + len(header)) % 4096)
    tile = _tile()
    part, done = folder / "model.safetensors.part", 0
    try:
        with open(part, "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for number, (tensor, shape) in enumerate(tensors(keys)):
                left, at = 2 * math.prod(shape), (number * 7919 * 4096) % TILE
                if "norm" in tensor:
                    file.write(torch.ones(shape, dtype=torch.bfloat16).view(torch.uint8).numpy())
                    left = 0
                while left:
                    count = min(left, TILE - at)
                    file.write(tile[at : at + count])
                    left, at = left - count, 0
                done += 2 * math.prod(shape)
                if progress is not None:
                    progress(done, end)
        part.rename(folder / "model.safetensors")
    finally:
        part.unlink(missing_ok=True)
    return folder


def _tile() -> memoryview:
    # Small enough that 80 layers of it stay finite in bf16.
    values = torch.randn(TILE // 2, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    return memoryview(values.view(torch.uint8).numpy())
