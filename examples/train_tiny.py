"""Trains examples/tiny-llama: a Llama small enough to commit (8 MB of bf16) that completes Python code plausibly.

The budget is wall-clock time, not steps: the learning rate warms up, holds, and decays over the last 30 % of --minutes, so the run ends
annealed on a fast machine and on a slow one. Needs torch >= 2.9, transformers, tokenizers and safetensors. On a machine that does other
work too, OMP_WAIT_POLICY=passive in the environment keeps the threads from burning their time slices while they wait for one another.

    python examples/train_tiny.py --minutes 75 --threads 2 --autocast --out examples/tiny-llama
"""
import argparse
import datetime
import hashlib
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tiny_corpus import BEGIN, CONTEXT, END, VOCAB, batches, read_corpus, train_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

SIZE_BOUND = 8_000_000                                   # bytes of model.safetensors
DECAY = 0.3                                              # this last part of the run anneals, and trains on CONTEXT tokens, not on half
LR = {"muon": 0.02, "adamw": 3e-3}
REPORT_SECONDS, SNAPSHOT_SECONDS = 30, 180
PROMPTS = ("def fibonacci(n):\n", "import os\n\nclass ", "for i in range(")

# A user's turn becomes a comment and the assistant's is code: the form in which the corpus itself holds instructions.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}\n"
    "{% else %}# {{ message['content'] | replace('\n', '\n# ') }}\n{% endif %}{% endfor %}"
)


def build_model(tokenizer):
    """A Llama of 3.97 M parameters, tied embeddings, fp32."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=640, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
        head_dim=32, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BEGIN), eos_token_id=tokenizer.token_to_id(END), attention_bias=False, mlp_bias=False))


def build_optimizers(model):
    """Muon for the matrices of the blocks (it needs far fewer steps than AdamW at this size), AdamW for the embedding and the norms."""
    named = [(p.ndim == 2 and ".layers." in name, p) for name, p in model.named_parameters()]
    muon = torch.optim.Muon([p for in_block, p in named if in_block], lr=LR["muon"], momentum=0.95, weight_decay=0.05)
    adamw = torch.optim.AdamW([p for in_block, p in named if not in_block], lr=LR["adamw"], betas=(0.9, 0.95), weight_decay=0.0)
    return {"muon": muon, "adamw": adamw}


def lr_factor(progress):
    """Warm-up over the first 2 %, constant, linear decay to 2 % of the peak over the last DECAY; progress in [0, 1]."""
    return max(0.02, min(1.0, progress / 0.02, (1.0 - progress) / DECAY))


@torch.no_grad()
def token_losses(model, ids, length):
    """Losses in nats, fp32 [tokens - 1], of ids [tokens], in windows of `length` that start without a past (the harder way to count)."""
    losses = []
    for start in range(0, len(ids) - 1, length):
        window = ids[start:start + length + 1].to(model.device)
        logits = model(window[None, :-1]).logits[0].float()                                # [window, VOCAB]
        losses.append(F.cross_entropy(logits, window[1:], reduction="none").cpu())
    return torch.cat(losses)


def measure(model, tokenizer, files, length=CONTEXT):
    """Held-out numbers over whole files: loss in nats a token, perplexity, bits a byte; and the loss of every file."""
    rows, nats, tokens, size = [], 0.0, 0, 0
    for name, text in files:
        losses = token_losses(model, torch.tensor(tokenizer.encode(text).ids), length)
        raw = text.encode()
        rows.append({"file": name, "sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw), "tokens": len(losses),
                     "loss": round(losses.mean().item(), 4), "bits_per_byte": round(losses.sum().item() / math.log(2) / len(raw), 4)})
        nats, tokens, size = nats + losses.double().sum().item(), tokens + len(losses), size + len(raw)
    loss = nats / tokens
    return {"loss": round(loss, 4), "perplexity": round(math.exp(loss), 3), "bits_per_byte": round(nats / math.log(2) / size, 4),
            "tokens": tokens, "bytes": size, "window": length, "files": rows}


def complete(model, tokenizer, prompt, new_tokens=40, temperature=0.0):
    """The prompt and its continuation as text, greedy at temperature 0."""
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)                # [1, tokens]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    pad = tokenizer.token_to_id(END)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, pad_token_id=pad, **sampling)
    return tokenizer.decode(out[0].tolist())


def export(model, tokenizer, out, record):
    """Writes the checkpoint directory (bf16 weights, configs, tokenizer, training.json) and returns the rounded model in fp32.
    Raises RuntimeError when the weights exceed SIZE_BOUND."""
    out.mkdir(parents=True, exist_ok=True)
    rounded = LlamaForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.tie_weights()
    rounded.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id, pad_token_id=model.config.eos_token_id)
    rounded.save_pretrained(out)
    size = (out / "model.safetensors").stat().st_size
    if size > SIZE_BOUND:
        raise RuntimeError(f"model.safetensors is {size} bytes, at most {SIZE_BOUND} were wanted; make the model smaller")
    tokenizer.save(str(out / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END, "pad_token": END, "add_bos_token": True,
             "model_max_length": CONTEXT, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
    (out / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n")
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return rounded.float().to(model.device)


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="train examples/tiny-llama on Python's standard library")
    parser.error = lambda message: parser.exit(2, f"train_tiny.py: {message} (--help lists the options)\n")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write; snapshots land there during the run")
    parser.add_argument("--minutes", type=float, default=75.0, help="wall-clock budget of the training loop (default 75)")
    parser.add_argument("--steps", type=int, help="train this many steps instead; then only rounding differs between machines")
    parser.add_argument("--tokens-per-step", type=int, default=4096, help=f"a multiple of {CONTEXT} (default 4096)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", action="store_true", help="bf16 products, fp32 weights: twice as fast on a CPU with avx512_bf16")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt, which every snapshot writes")
    args = parser.parse_args(argv)
    if not args.minutes > 0 or (args.steps is not None and args.steps <= 0) or args.threads < 1:
        parser.error("--minutes, --steps and --threads must be positive")
    if args.tokens_per_step < CONTEXT or args.tokens_per_step % CONTEXT:
        parser.error(f"--tokens-per-step is {args.tokens_per_step}, expected a multiple of {CONTEXT}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file, expected a directory")
    if args.resume and not (args.out / "state.pt").is_file():
        parser.error(f"--resume: there is no {args.out / 'state.pt'}; leave --resume out to start afresh")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} does not work here: {str(error).splitlines()[0]}")
    return args


class Run:
    """One training run: the model, its optimizers, and the place it has reached, which is all that state.pt holds."""

    def __init__(self, args, command):
        self.args, self.command = args, command
        torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        self.files, self.held_out = read_corpus()
        self.tokenizer = train_tokenizer(text for _, text in self.files)
        self.model = build_model(self.tokenizer).to(args.device)
        self.optimizers = build_optimizers(self.model)
        # The beginnings of some held-out files: enough to see the curve, quick enough to look every three minutes.
        self.check = torch.cat([torch.tensor(self.tokenizer.encode(text).ids)[:4096] for _, text in self.held_out])[:16384]
        self.place = {"epoch": 0, "chunk": 0, "step": 0, "elapsed": 0.0, "tokens": 0, "curve": []}
        if args.resume:
            state = torch.load(args.out / "state.pt", map_location=args.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state[name])
            self.place = state["place"]

    def progress(self):
        """How much of the budget is spent, from 0 to 1."""
        return self.place["step"] / self.args.steps if self.args.steps else self.place["elapsed"] / (60 * self.args.minutes)

    def record(self):
        """What training.json says, less the final held-out numbers."""
        args, place = self.args, self.place
        size = {name: sum(len(text.encode()) for _, text in files) for name, files in (("train", self.files), ("held_out", self.held_out))}
        return {
            "date": datetime.date.today().isoformat(), "command": self.command, "torch": torch.__version__, "seed": args.seed,
            "machine": f"{platform.machine()} {args.device}, {args.threads} threads",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "corpus": {"python": platform.python_version(), "train_files": len(self.files), "train_bytes": size["train"],
                       "held_out_files": len(self.held_out), "held_out_bytes": size["held_out"]},
            "tokens_per_step": args.tokens_per_step, "context": CONTEXT, "learning_rates": LR, "decay": DECAY, "autocast": args.autocast,
            "steps": place["step"], "tokens_seen": place["tokens"], "epochs": place["epoch"], "minutes": round(place["elapsed"] / 60, 1),
            "curve": place["curve"],
        }

    def step(self, ids):
        """One update on ids [rows, length + 1]; returns (loss, learning-rate factor)."""
        factor = lr_factor(self.progress())
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = LR[name] * factor
        ids = ids.to(self.args.device)
        with torch.autocast(self.args.device.split(":")[0], dtype=torch.bfloat16, enabled=self.args.autocast):
            logits = self.model(ids[:, :-1], use_cache=False).logits                       # [rows, length, VOCAB]
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item(), factor

    def snapshot(self, loss):
        """Adds a point to the curve, writes the checkpoint and state.pt; returns the held-out loss."""
        held_out = token_losses(self.model, self.check, CONTEXT // 2).mean().item()
        self.place["curve"].append(
            {"step": self.place["step"], "tokens": self.place["tokens"], "loss": round(loss, 4), "held_out": round(held_out, 4)})
        out = self.args.out
        export(self.model, self.tokenizer, out, self.record())
        states = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        torch.save({"model": self.model.state_dict(), "place": self.place, **states}, out / "state.tmp")
        (out / "state.tmp").replace(out / "state.pt")
        return held_out

    def train(self):
        """Trains until the budget is spent, with a line every half minute and a snapshot every three."""
        place, args = self.place, self.args
        source = batches(
            self.files, self.tokenizer, seed=args.seed, epoch=place["epoch"], chunk=place["chunk"], tokens_per_step=args.tokens_per_step,
            length_now=lambda: CONTEXT if self.progress() > 1 - DECAY else CONTEXT // 2)
        shown = saved = time.monotonic()
        start, losses, shown_tokens, first = shown - place["elapsed"], [], place["tokens"], True
        print("  step  epoch     loss  held-out   tokens/s      lr   left", flush=True)
        while self.progress() < 1:
            place["epoch"], chunk, ids = next(source)
            loss, factor = self.step(ids)
            losses.append(loss)
            now = time.monotonic()
            place.update(chunk=chunk + 1, step=place["step"] + 1, tokens=place["tokens"] + ids[:, 1:].numel(), elapsed=now - start)
            done = self.progress() >= 1
            if not (first or done or now - shown > REPORT_SECONDS):
                continue
            mean, rate = sum(losses) / len(losses), (place["tokens"] - shown_tokens) / (now - shown)
            left = max(0.0, place["elapsed"] * (1 / self.progress() - 1) / 60)
            held_out = f"{self.snapshot(mean):.4f}" if done or now - saved > SNAPSHOT_SECONDS else ""
            print(f"{place['step']:6d} {place['epoch']:6d} {mean:8.4f} {held_out:>9} {rate:10.0f} {factor:7.3f} {left:5.1f}m", flush=True)
            if held_out:
                saved = time.monotonic()
                print("       ", repr(complete(self.model, self.tokenizer, PROMPTS[len(place["curve"]) % len(PROMPTS)])), flush=True)
            shown, losses, shown_tokens, first = time.monotonic(), [], place["tokens"], False


def main(argv=None):
    args = parse_arguments(argv)
    transformers.logging.disable_progress_bar()
    run = Run(args, " ".join(["python", "examples/train_tiny.py", *(sys.argv[1:] if argv is None else argv)]))
    record = run.record()
    print(f"{record['parameters'] / 1e6:.2f} M parameters, {record['corpus']['train_bytes'] / 1e6:.1f} MB of Python in "
          f"{len(run.files)} files, {len(run.held_out)} held out, {args.threads} threads on {args.device}", flush=True)
    if args.resume:
        print(f"resumed at step {run.place['step']}, {run.place['elapsed'] / 60:.1f} minutes in", flush=True)
    run.train()
    rounded = export(run.model, run.tokenizer, args.out, run.record())
    numbers = measure(rounded, run.tokenizer, run.held_out)                # of the bf16 weights as written
    export(run.model, run.tokenizer, args.out, {**run.record(), "held_out": numbers})
    (args.out / "state.pt").unlink(missing_ok=True)
    print(f"held-out: loss {numbers['loss']}, perplexity {numbers['perplexity']} a token, {numbers['bits_per_byte']} bits a byte")
    for prompt in PROMPTS:
        for temperature in (0.0, 0.7):
            print(f"--- temperature {temperature} ---", complete(rounded, run.tokenizer, prompt, 120, temperature), sep="\n")


if __name__ == "__main__":
    main()
