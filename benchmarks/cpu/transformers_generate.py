"""The peer of the end-to-end benchmark: transformers generates from a model directory and prints its speed as JSON.

A process of its own, as the command line it is compared with: python transformers_generate.py MODEL PROMPT_IDS.json NEW_TOKENS THREADS.
Times are taken as hetero-attn takes them: from the request to the first token (prefill), and from there to the last one (decode).
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.generation import BaseStreamer


class Clock(BaseStreamer):
    """Notes when each token came; the first thing put is the prompt."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def main() -> int:
    model_dir, prompt_file, new_tokens, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    prompt = torch.tensor([json.loads(Path(prompt_file).read_text())])
    clock = Clock()
    with torch.inference_mode():
        started = time.perf_counter()
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=int(new_tokens),
                              min_new_tokens=int(new_tokens), streamer=clock)
    times = clock.times[1:]
    tokens = made.shape[1] - prompt.shape[1]
    print(json.dumps({"prompt_tokens": prompt.shape[1], "tokens": tokens, "first_token_s": times[0] - started,
                      "tokens_per_s": (len(times) - 1) / (times[-1] - times[0])}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
