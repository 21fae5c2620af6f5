"""The parts of make bench-edge, each a function (scratch, quick, say) -> JSON. A part can run by itself: they take minutes each."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from edge import ranks, shapes
from hetero_attn.models.export import export
from hetero_attn.models.shard_folder import folder_name
from hetero_attn.parallel.launch import run_ranks

THROTTLE_MB_S = 200.0           # for each process; four of them stay below what the disk gives
WINDOWS = (1, 2, 3, 4, 8)       # blocks, of the ablation


def checkpoint(scratch: Path, name: str, say, layers: int | None = None) -> Path:
    """The checkpoint of a shape, written once."""
    folder = scratch / (name if layers is None else f"{name}-{layers}")
    if not (folder / "model.safetensors").exists():
        need = shapes.nbytes(name) if layers is None else 0
        if need > shutil.disk_usage(scratch).free:
            raise SystemExit(f"{scratch} has {shutil.disk_usage(scratch).free / 1e9:.0f} GB free, {name} needs {need / 1e9:.0f} GB: give "
                             "--scratch another disk, or --quick")
        say(f"writing {folder}")
        shapes.write(folder, name, layers=layers)
    return folder


def parts_of(folder: Path, world_size: int, say, only: list[int] | None = None) -> Path:
    out = folder.with_name(f"{folder.name}-tp{world_size}")
    say(f"cutting {folder.name} for {world_size} ranks")
    export(folder, out, world_size, ranks=only)
    return out


def main(scratch: Path, quick: bool, say) -> dict:
    """tp 2 within 1 GiB a rank (quick: 512 MiB and the 1B shape): peak, token time, and the disk alone."""
    name, budget = ("llama-1b", "512MiB") if quick else ("llama2-7b", "1GiB")
    parts = parts_of(checkpoint(scratch, name, say), 2, say)
    say(f"{name}, 2 ranks, {budget} each")
    return {"model": name, "ranks": run_ranks(ranks.generate, (str(parts), {"memory_budget": budget}, 5), 2, threads=1)}


def bits(scratch: Path, quick: bool, say) -> dict:
    """The 1B shape, streamed within 450 MiB and held: the same logits."""
    parts = parts_of(checkpoint(scratch, "llama-1b", say), 2, say)
    say("1B shape: held, then streamed")
    held = run_ranks(ranks.generate, (str(parts), {}, 6), 2, threads=1)[0]
    streamed = run_ranks(ranks.generate, (str(parts), {"memory_budget": "450MiB"}, 6), 2, threads=1)[0]
    return {"equal": held["logits"] == streamed["logits"] and held["tokens"] == streamed["tokens"], "tokens": len(held["tokens"]),
            "held_token_s": held["token_s"], "streamed_token_s": streamed["token_s"]}


def ablation(scratch: Path, quick: bool, say) -> dict:
    """Windows of 1, 2, 3, 4, 8 blocks, nothing resident, the 1B shape on 2 ranks."""
    parts, rows = parts_of(checkpoint(scratch, "llama-1b", say), 2, say), {}
    for blocks in WINDOWS:
        say(f"window of {blocks}")
        rows[blocks] = run_ranks(ranks.generate, (str(parts), {"window": blocks}, 6), 2, threads=1)
    return {"windows": rows}


def seventy(scratch: Path, quick: bool, say) -> dict:
    """The 70B shape cut for 8, ranks 0 and 1 one by one: one layer's files stand for all 80, read directly each time."""
    layers = 1
    folder = checkpoint(scratch, "llama2-70b", say, layers=layers)
    parts = parts_of(folder, 8, say, [0, 1])
    (folder / "model.safetensors").unlink(missing_ok=True)
    found = {}
    for rank in (0, 1):
        own = parts / folder_name(rank, 8)
        repeat_layer(own, shapes.config("llama2-70b"))
        say(f"70B shape, rank {rank} of 8")
        found[rank] = run_ranks(ranks.alone, (str(parts), rank, 8, {"memory_budget": "1GiB"}, 3), 1, threads=2)[0]
    return {"ranks": found}


LINK_SETS = {"star": ("algorithm=star",), "one_shot": ("algorithm=one_shot",), "auto": (), "auto, low-bit": ("codec=auto",)}


def over_links(scratch: Path, quick: bool, say) -> dict:
    """4 and 8 ranks over emulated 300 Mbit/s, 1 ms links (root only): token times by algorithm, weights held, beside one rank's."""
    from links import links, unavailable

    if reason := unavailable():
        return {"skipped": reason}
    folder, found = checkpoint(scratch, "links", say), {}
    alone = run_ranks(ranks.generate, (str(folder), {}, 12), 1, threads=1)[0]["token_s"]
    for count in (4,) if quick else (4, 8):
        with links(count, 300, 1) as network:
            for name, sets in LINK_SETS.items():
                say(f"{count} ranks over links, {name}")
                found[f"{count} {name}"] = network.run(ranks.over_links, (str(folder), sets, 12), timeout_s=120)[0]
    return {"rows": found, "alone_s": alone}


def repeat_layer(folder: Path, keys: dict) -> None:
    """Layer 0's files under every layer's name, by link: the same bytes on the disk, read anew for each layer."""
    manifest = json.loads((folder / "shard.json").read_text())
    if json.loads((folder / "config.json").read_text())["num_hidden_layers"] == keys["num_hidden_layers"]:
        return
    held = manifest["files"]["held.safetensors"]["tensors"]
    for layer in range(1, keys["num_hidden_layers"]):
        for name in [name for name in manifest["files"] if name.startswith("layer-000.")]:
            other = name.replace("layer-000.", f"layer-{layer:03d}.")
            (folder / other).unlink(missing_ok=True)
            os.symlink(name, folder / other)
            facts = manifest["files"][name]
            tensors = {tensor.replace("layers.0.", f"layers.{layer}."): info for tensor, info in facts["tensors"].items()}
            manifest["files"][other] = facts | {"tensors": tensors}
        for tensor in [tensor for tensor in held if "layers.0." in tensor]:
            held[tensor.replace("layers.0.", f"layers.{layer}.")] = held[tensor]
    sizes = manifest["model"].split("-")
    manifest["model"] = "-".join([*sizes[:4], str(keys["num_hidden_layers"]), *sizes[5:]])
    (folder / "config.json").write_text(json.dumps(keys))
    (folder / "shard.json").write_text(json.dumps(manifest))


def accelerate(scratch: Path, quick: bool, say) -> dict:
    """Four ranks against Accelerate's disk offload of the 1B shape, each process with its own throttled disk."""
    folder = checkpoint(scratch, "llama-1b", say)
    parts = parts_of(folder, 4, say)
    found: dict = {"throttle_mb_s": THROTTLE_MB_S}
    for name, limit in (("throttled", THROTTLE_MB_S), ("unthrottled", None)):
        say(f"4 ranks, {name}")
        ours = run_ranks(ranks.generate, (str(parts), {"memory_budget": "340MiB"}, 4, limit), 4, threads=1)
        say(f"Accelerate, {name}")
        found[name] = {"ours": ours, "accelerate": accelerate_run(folder, scratch, limit)}
    return found


ACCELERATE = """
import json, sys, time, torch
sys.path[:0] = {paths!r}
from edge import ranks
import os
ranks.throttled(f"hetero-attn-bench-{{os.getpid()}}", {limit!r})
from transformers import AutoModelForCausalLM
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.bfloat16, device_map="auto", max_memory={{"cpu": {memory!r}}},
                                             offload_folder={offload!r})
ids, times, past = torch.tensor([ranks.PROMPT]), [], None
for _ in range({tokens}):
    if os.path.exists("/proc/sys/vm/drop_caches"):
        open("/proc/sys/vm/drop_caches", "w").write("1")        # a cache that holds the whole checkpoint would stand for the disk
    began = time.perf_counter()
    with torch.no_grad():
        out = model(input_ids=ids, past_key_values=past, use_cache=True)
    times.append(time.perf_counter() - began)
    past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
print(json.dumps({{"first_s": times[0], "token_s": sorted(times[1:])[len(times) // 2 - 1], "times": times, "peak": peak,
                   "devices": sorted(set(map(str, model.hf_device_map.values())))}}))
"""


def accelerate_run(folder: Path, scratch: Path, limit: float | None) -> dict:
    """The smallest max_memory that works, in steps; its token times, and the peak of the process."""
    paths = [path for path in sys.path if path]
    for memory in ("150MB", "300MB", "600MB"):
        offload = scratch / "offload"
        code = ACCELERATE.format(paths=paths, limit=limit, folder=str(folder), memory=memory, offload=str(offload), tokens=3)
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
        shutil.rmtree(offload, ignore_errors=True)
        if ran.returncode == 0:
            return json.loads(ran.stdout.splitlines()[-1]) | {"max_memory": memory}
        failure = ran.stderr.strip().splitlines()[-1:]
    return {"failed": failure}


def machine() -> dict:
    """Where and when."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    import torch

    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
            "page": resource.getpagesize()}


PARTS = {"main": main, "bits": bits, "ablation": ablation, "accelerate": accelerate, "seventy": seventy, "links": over_links}
