"""Small random checkpoints of every family, what transformers says about them, and one awkward schedule to run them through.

Shared by the tests of the decoder. The sizes are odd on purpose: FFN and vocabulary that no rank count divides, 3 KV heads, windows
shorter than the prompts, softcaps low enough to bend the scores, biases and norm weights that are not 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

TOLERANCE = 1e-4                                        # fp32 logits, max abs difference
PROMPT_LENGTHS = (1, 5, 23, 14)
NEW_TOKENS = 5
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2}
ODD = {"hidden_size": 48, "head_dim": 16, "num_attention_heads": 6, "num_key_value_heads": 3}

# name -> (transformers' model_type, what differs from SMALL)
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama2": ("llama", {"num_attention_heads": 4}),
    "llama3.1": ("llama", {**ODD, "rope_parameters": LLAMA3_ROPE}),
    "llama3.2-tied": ("llama", {**GQA, "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-biases-linear": ("llama", {
        "num_attention_heads": 8, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}}),
    "yi": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}),
    "mistral": ("mistral", {**GQA, "sliding_window": 7}),
    "mistral-nemo": ("mistral", {**GQA, "head_dim": 24, "sliding_window": None}),
    "qwen2": ("qwen2", {**ODD, "head_dim": 8}),
    "qwen2.5-yarn-window": ("qwen2", {**GQA, "rope_parameters": YARN_ROPE, "use_sliding_window": True, "sliding_window": 5,
                                      "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**ODD, "head_dim": 20}),
    "gemma2": ("gemma2", {**GQA, "head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 6, "attn_logit_softcapping": 4.0,
                          "final_logit_softcapping": 3.0, "num_hidden_layers": 3}),
    "mixtral": ("mixtral", {**ODD, "head_dim": None, "intermediate_size": 35, "num_local_experts": 5, "num_experts_per_tok": 2}),
}
SMALL = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 101, "num_hidden_layers": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}


@dataclass(frozen=True)
class Expected:
    """transformers' full forward over each prompt and its greedy continuation, every sequence alone."""

    prompts: list[list[int]]
    continuations: list[list[int]]                      # NEW_TOKENS greedy tokens of each prompt
    logits: list[torch.Tensor]                          # [prompt + NEW_TOKENS - 1, vocab] fp32 of each


def make_model(name: str, seed: int = 0, **changes):
    """A transformers model of the family with every parameter random, eager attention, fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, keys = FAMILIES[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**SMALL, **keys, **changes})
    config._experts_implementation = "eager"            # transformers' grouped product wants sizes that are multiples of 16 bytes
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(0.2 * noise) if "norm" in key else parameter.copy_((0.3 if key.endswith("bias") else 0.15) * noise)
    return model


@torch.no_grad()
def expect(model, lengths=PROMPT_LENGTHS, new_tokens: int = NEW_TOKENS) -> Expected:
    """Greedy decoding by repeated full forwards, so that no cache of transformers takes part."""
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, model.config.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    continuations, logits = [], []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(new_tokens):
            out = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
            tokens.append(int(out[-1].argmax()))
        continuations.append(tokens[len(prompt):])
        logits.append(out)
    return Expected(prompts, continuations, logits)


def save_family(name: str, folder: Path, **changes) -> Expected:
    """Writes the family's checkpoint into `folder` and returns what transformers computes with it."""
    model = make_model(name, **changes)
    model.save_pretrained(folder)
    return expect(model)


def decode(decoder, prompts, new_tokens: int = NEW_TOKENS, chunks=(3, 2, 7, 5), check_cache: bool = True):
    """Greedy decoding through the packed step: prompt i is prefilled in chunks of chunks[i] tokens, so that short prompts already decode
    while long ones are still being read, and the last prompt is admitted only when the first has been freed.

    Returns (continuations, logits), logits[i] being [prompt + new_tokens - 1, vocab]; on a rank without logits (None, None).
    """
    cache = decoder.new_cache(max_tokens=sum(map(len, prompts)) + len(prompts) * new_tokens, max_sequences=len(prompts) - 1)
    tokens, logits, done = [list(prompt) for prompt in prompts], [[] for _ in prompts], [0] * len(prompts)
    totals = [len(prompt) + new_tokens - 1 for prompt in prompts]            # the newest token is never fed
    ids = {index: cache.add_sequence() for index in range(len(prompts) - 1)}
    waiting = [len(prompts) - 1]
    sees_logits = decoder.vocabulary == "sharded" or decoder.communicator.rank == 0
    while ids:
        counts = {i: min(chunks[i % len(chunks)], max(len(prompts[i]) - done[i], 1)) for i in ids}
        fed = [token for i in ids for token in tokens[i][done[i]:done[i] + counts[i]]] if sees_logits else None
        step = cache.step([ids[i] for i in ids], [counts[i] for i in ids], fed, last_only=False)
        out = decoder(step, cache)
        assert (out is not None) == sees_logits
        begin = 0
        for i in list(ids):
            done[i] += counts[i]
            if sees_logits:
                logits[i].append(out[begin:begin + counts[i]])
                if done[i] >= len(prompts[i]):
                    tokens[i].append(int(logits[i][-1][-1].argmax()))
            begin += counts[i]
            if done[i] == totals[i]:
                cache.free(ids.pop(i))
                if waiting:
                    late = waiting.pop()
                    ids[late] = cache.add_sequence()
    if check_cache:
        assert cache.free_blocks == cache.num_blocks and not cache.sequences
    if not sees_logits:
        return None, None
    return [row[len(prompt):] for row, prompt in zip(tokens, prompts)], [torch.cat(rows) for rows in logits]


def difference(logits: list[torch.Tensor], expected: Expected) -> float:
    """The largest absolute difference over all sequences, positions and vocabulary; nan if any logit is nan."""
    assert [row.shape for row in logits] == [row.shape for row in expected.logits]
    return max(torch.nan_to_num((a.float() - b).abs(), nan=float("inf")).max().item() for a, b in zip(logits, expected.logits))
