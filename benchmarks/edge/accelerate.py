"""Accelerate's disk offload beside four of our ranks, every process with a disk of its own: the same checkpoint, the same few tokens.

Accelerate gets the smallest max_memory that works (then everything is on the disk) and, before every token, a page cache without the
checkpoint: one that holds it whole would stand for the disk. Its reads are limited from its first token on, ours from the start, since
our plan is made from what the disk gives.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from edge import ranks, throttle
from hetero_attn.parallel.launch import RankFailure, run_ranks

RANKS = 4
MORE_MIB = 12                   # of budget: the window then has room for what the disk reads while ranks wait for one another
MORE = f"ours, {MORE_MIB} MiB more"
MEMORIES = ("1MB", "10MB", "25MB", "50MB", "100MB", "200MB", "400MB", "800MB", "1600MB")
ONE_RUN = """
import json, os, sys, threading, time
sys.path[:0] = {paths!r}
import torch
from safetensors import safe_open
from edge import throttle
from edge.ranks import PROMPT
from transformers import AutoModelForCausalLM

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) << 10

def forget(folder):
    for name in os.listdir(folder):
        file = os.open(os.path.join(folder, name), os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)

anonymous, over = [0], threading.Event()
def watch():
    while not over.wait(0.02):
        anonymous[0] = max(anonymous[0], status("RssAnon"))
threading.Thread(target=watch, daemon=True).start()
torch.set_num_threads({threads})
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.bfloat16, device_map="auto", max_memory={{"cpu": {memory!r}}},
                                             offload_folder={offload!r})
ids, times, past, chosen = torch.tensor([PROMPT]), [], None, []
with throttle.limited({folder!r}, {limit!r}):
    for _ in range({tokens}):
        forget({folder!r})
        began = time.perf_counter()
        with torch.no_grad():
            out = model(input_ids=ids, past_key_values=past, use_cache=True)
        times.append(time.perf_counter() - began)
        past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        chosen.append(int(ids))
over.set()

def read_alone():
    # every tensor as Accelerate gets it, a byte of each page looked at, nobody multiplying
    forget({folder!r})
    began = time.perf_counter()
    for name in os.listdir({folder!r}):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join({folder!r}, name), "pt") as file:
                for key in file.keys():
                    file.get_tensor(key).view(torch.uint8).flatten()[::4096].max()
    return time.perf_counter() - began

peak = status("VmHWM")
print(json.dumps({{"first_s": times[0], "token_s": sorted(times[1:])[(len(times) - 1) // 2], "times": times, "peak": peak,
                   "disk_s": None if {limit!r} else read_alone(), "anonymous": anonymous[0], "tokens": chosen,
                   "on": sorted(set(map(str, model.hf_device_map.values())))}}))
"""


def torch_alone() -> int:
    """Peak bytes of a process that has imported torch and nothing else: what every process here holds before it holds a weight."""
    code = "import torch; print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout) << 10


def theirs(folder: Path, limit: float | None, tokens: int, memories: tuple[str, ...] = MEMORIES) -> dict:
    """One process under Accelerate with the smallest max_memory of `memories` that works."""
    failure = ""
    for memory in memories:
        offload = folder.with_name(f"{folder.name}-offload")
        code = ONE_RUN.format(paths=[path for path in sys.path if path], folder=str(folder), memory=memory, offload=str(offload),
                              limit=limit, tokens=tokens, threads=2)
        try:
            ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
        finally:
            shutil.rmtree(offload, ignore_errors=True)
            throttle.sweep()
        if ran.returncode == 0:
            size = (folder / "model.safetensors").stat().st_size
            return json.loads(ran.stdout.splitlines()[-1]) | {"max_memory": memory, "read_bytes": size}
        failure = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
    raise SystemExit(f"Accelerate worked with no max_memory up to {memories[-1]}: {failure}")


def smallest(parts: Path) -> str:
    """The smallest --memory-budget that the ranks accept, as their refusal of an impossible one says it."""
    try:
        run_ranks(ranks.generate, (str(parts), {"memory_budget": "1MiB"}, 1), RANKS, threads=1)
    except RankFailure as refused:
        found = re.search(r"the smallest that works is (\d+MiB)", str(refused))
        if found:
            return found[1]
        raise
    raise RuntimeError("1 MiB was not refused")


def by_turns(parts: Path, folder: Path, tokens: int, rounds: int) -> dict[str, dict]:
    """Ours within the smallest budget and within one that is MORE_MIB larger, and theirs, where one disk serves all: in turns, since its
    rate changes from minute to minute."""
    least, memories, others = smallest(parts), MEMORIES, []
    budgets = {"ours": least, MORE: f"{int(least.removesuffix('MiB')) + MORE_MIB}MiB"}
    mine: dict[str, list] = {name: [] for name in budgets}
    for _ in range(rounds):
        for name, budget in budgets.items():
            mine[name].append(ours(parts, None, tokens, budget)["ranks"])
        others.append(theirs(folder, None, tokens, memories))
        memories = (others[0]["max_memory"],)
    return {name: {"budget": budgets[name], "ranks": [together(rank) for rank in zip(*runs)]} for name, runs in mine.items()} | {
        "Accelerate": together(others)}


def together(runs: Sequence[dict]) -> dict:
    """Runs of one process as if they were one: all times and their medians, the highest peaks."""
    found = dict(runs[-1])
    for name in ("times", "passes"):
        if name in found:
            found[name] = [value for run in runs for value in run[name]]
    if "times" in found:
        # theirs has the first token's time among them
        found["token_s"] = statistics.median([value for run in runs for value in run["times"][-max(1, len(run["tokens"]) - 1):]])
    for name in ("first_s", "disk_s", "plan_token_s"):
        if name in found:
            found[name] = statistics.median(run[name] for run in runs)
    for name in ("peak", "anonymous"):
        if name in found:
            found[name] = max(run[name] for run in runs)
    return found


def ours(parts: Path, limit: float | None, tokens: int, budget: str | None = None) -> dict:
    """Four ranks, each within the smallest budget that works."""
    budget = budget or smallest(parts)
    try:
        found = run_ranks(ranks.generate, (str(parts), {"memory_budget": budget}, tokens, 1, limit), RANKS, threads=1)
        return {"budget": budget, "ranks": found}
    finally:
        throttle.sweep()
