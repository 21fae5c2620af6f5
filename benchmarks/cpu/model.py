"""End to end: `hetero-attn generate` on a random bf16 model of Llama 3.2 1B's shape, beside transformers and beside the memory's speed.

Each run is a process of its own, in turns. Decode reads every weight once for a token, so its limit is the weights' bytes over the read
rate of the same minutes. Weights are random and the tokenizer is examples/tiny-llama's: only speed is asked for.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cpu import verdicts
from cpu.limits import ReadProbe
from cpu.verdicts import Verdict
from hetero_attn.models.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TOKENIZER_OF = ROOT / "examples" / "tiny-llama"
PROMPT_TOKENS, NEW_TOKENS = 512, 64
TIMEOUT_S = 600
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 128256, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": True,
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": None,
}


@dataclass
class Speed:
    """Tokens a second of each run of ours and of transformers, prefill and decode; the decode limit of each pair of runs."""

    ours_prefill: list[float]
    ours_decode: list[float]
    transformers_prefill: list[float]
    transformers_decode: list[float]
    decode_limit: list[float]
    weight_bytes: int
    backend: str

    def verdicts(self) -> list[Verdict]:
        median = statistics.median
        return [verdicts.decoder_decode(median(self.ours_decode), median(self.decode_limit)),
                verdicts.decoder_prefill(median(self.ours_prefill), median(self.transformers_prefill))]


def measure(backend: str, rounds: int, threads: int, l3_bytes: int, progress: Callable[[str], None]) -> Speed:
    """`rounds` runs of each. Raises RuntimeError with the command's own words when one fails."""
    read = ReadProbe(4 * l3_bytes)
    with tempfile.TemporaryDirectory(prefix="llama-1b-shape-") as folder:
        folder = Path(folder)
        progress("model: writing 1.2 billion random weights")
        weight_bytes = write_model(folder)
        prompt = prompt_text(Tokenizer.from_dir(folder))
        speed = Speed([], [], [], [], [], weight_bytes, backend)
        for number in range(rounds):
            progress(f"model: hetero-attn generate, run {number + 1} of {rounds}")
            readings = [read() for _ in range(3)]
            facts = ours(folder, prompt, backend, threads)
            result = facts["results"][0]
            if facts["backend"] != backend:
                raise RuntimeError(f"generate ran on backend {facts['backend']!r}, {backend!r} was asked; see: hetero-attn doctor")
            speed.ours_prefill.append(result["prompt_tokens"] / result["first_token_s"])
            speed.ours_decode.append(result["tokens_per_s"])
            readings += [read() for _ in range(3)]
            speed.decode_limit.append(statistics.median(readings) / weight_bytes)
            progress(f"model: transformers, run {number + 1} of {rounds}")
            facts = transformers(folder, prompt, threads)
            speed.transformers_prefill.append(facts["prompt_tokens"] / facts["first_token_s"])
            speed.transformers_decode.append(facts["tokens_per_s"])
    return speed


def tensors(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint."""
    hidden, ffn, kv = config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,), f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden), f"{prefix}self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}self_attn.v_proj.weight": (kv, hidden), f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}mlp.gate_proj.weight": (ffn, hidden), f"{prefix}mlp.up_proj.weight": (ffn, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, ffn),
        }
    return shapes


def write_model(folder: Path, config: dict = CONFIG) -> int:
    """A model directory with fixed random weights; returns the bytes that one token's forward pass reads (all of them, tied)."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 24, generator=generator).mul_(0.02).to(torch.bfloat16)          # repeated: speed does not depend on the values
    weights = {}
    for name, shape in tensors(config).items():
        size = torch.Size(shape).numel()
        if len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            weights[name] = pool.repeat(-(-size // len(pool)))[:size].view(shape).clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER_OF / name).read_bytes())
    return sum(tensor.nbytes for tensor in weights.values())


def prompt_text(tokenizer: Tokenizer) -> str:
    """A text of exactly PROMPT_TOKENS tokens."""
    text = " a" * PROMPT_TOKENS
    while len(tokenizer.encode(text)) > PROMPT_TOKENS:
        text = text[:-2]
    if len(tokenizer.encode(text)) != PROMPT_TOKENS:
        raise RuntimeError(f"the tokenizer of {TOKENIZER_OF} cannot make a prompt of {PROMPT_TOKENS} tokens from repeated words")
    return text


def ours(folder: Path, prompt: str, backend: str, threads: int) -> dict:
    """The facts of one `hetero-attn generate --json`. The profile lists `backend` first: attention and products both run on it."""
    command = [sys.executable, "-m", "hetero_attn", "generate", str(folder), "--profile", "cpu", "--set", f"backends=[{backend},sdpa]",
               "--max-new-tokens", str(NEW_TOKENS), "--temperature", "0", "--ignore-eos", "--json", "--prompt-file", "-"]
    if backend == "sdpa":
        command[command.index("backends=[sdpa,sdpa]")] = "backends=[sdpa]"
    return run(command, threads, prompt)


def transformers(folder: Path, prompt: str, threads: int) -> dict:
    """The facts of one run of transformers_generate.py on the same token ids."""
    ids = folder / "prompt.json"
    ids.write_text(json.dumps(Tokenizer.from_dir(folder).encode(prompt)))
    script = str(Path(__file__).with_name("transformers_generate.py"))
    return run([sys.executable, script, str(folder), str(ids), str(NEW_TOKENS), str(threads)], threads)


def run(command: list[str], threads: int, given: str = "") -> dict:
    """The JSON object a command prints last. Raises RuntimeError with the end of its stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'backends'}"}
    done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} failed ({done.returncode}): {done.stderr.strip()[-800:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
