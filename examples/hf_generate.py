"""A Hugging Face model with its attention served by hetero_attn; nothing else of the program changes.

    python examples/hf_generate.py                                      # the tiny checkpoint of this repository
    python examples/hf_generate.py path/to/model "The capital of France is"
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hetero_attn.integrations.transformers import register


def main(model_dir: str = str(Path(__file__).parent / "tiny-llama"), prompt: str = "def read_lines(path):\n    ") -> None:
    register()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="hetero_attn", dtype="auto").eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
