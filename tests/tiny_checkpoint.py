"""Small Hugging Face directories for tests: a random Llama with a tokenizer trained on the spot, or the tokenizer alone."""

import json
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "def add(a, b):\n    return a + b\n", "Hello world, how are you? I am fine.", "naïve café — 東京 ñandú 🙂🙃",
    "for i in range(10):\n    print(i)\n", "The quick brown fox jumps over the lazy dog.",
] * 4
CHAT = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]


def byte_level(vocab_size=320):
    """GPT-2's kind: every byte has a token, so any token sequence is bytes, whole characters or not."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet,
                                                            show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return tokenizer


def byte_fallback():
    """Llama 2's kind: ▁ for spaces, <0xE6> tokens for bytes of unknown characters, a decoder that strips the first space."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)])
    tokenizer.train_from_iterator(TEXT[:2], trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    stored = json.loads(tokenizer.to_str())
    stored["added_tokens"] = [token for token in stored["added_tokens"] if not token["content"].startswith("<0x")]
    return tokenizers.Tokenizer.from_str(json.dumps(stored))


def write_tokenizer(folder: Path, tokenizer=None, **config) -> Path:
    """Writes tokenizer.json and tokenizer_config.json; config entries override or extend the usual ones (None leaves one out)."""
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>",
             "chat_template": CHAT, "clean_up_tokenization_spaces": False} | config
    facts = {name: value for name, value in facts.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def write_checkpoint(folder: Path, *, context_length=128, dtype=torch.float32, **config) -> Path:
    """A Llama of random weights (large enough that greedy text varies), 6 query and 2 KV heads, with the byte-level tokenizer."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    write_tokenizer(folder)
    sizes = {"vocab_size": 320, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
             "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    model = LlamaForCausalLM(LlamaConfig(**sizes | config, max_position_embeddings=context_length, bos_token_id=0, eos_token_id=1,
                                         tie_word_embeddings=False)).to(dtype)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1)
    model.save_pretrained(folder)
    return folder
