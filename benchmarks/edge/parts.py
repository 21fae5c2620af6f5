"""The parts of make bench-edge, each a function of a Run, which writes its steps into the record. A part can run by itself: they take
minutes each, and a part's own slices are deleted when it is over."""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge import accelerate, over_links, ranks, shapes, throttle, windows
from edge.record import Record
from hetero_attn.models.export import export
from hetero_attn.models.shard_folder import folder_name
from hetero_attn.parallel.launch import run_ranks

WINDOWS = (1, 2, 3, 4, 8)       # blocks, of the ablation
LARGE, SMALL = "llama2-7b", "llama-1b"


@dataclass(frozen=True)
class Run:
    """What was asked for. scratch: where checkpoints go; quick: the small shape and fewer steps; keep: slices stay there afterwards;
    throttle_mb_s: reads of a process with a disk of its own."""

    scratch: Path
    quick: bool
    keep: bool
    throttle_mb_s: float
    say: Callable[[str], None]
    record: Record

    @property
    def shape(self) -> str:
        return SMALL if self.quick else LARGE

    def checkpoint(self, name: str, layers: int | None = None) -> Path:
        """The checkpoint of a shape, written once. layers: only so many of them."""
        folder = self.scratch / (name if layers is None else f"{name}-{layers}")
        if not (folder / "model.safetensors").exists():
            self._room(shapes.nbytes(name, layers), name)
            self.say(f"writing {folder}")
            shapes.write(folder, name, layers=layers)
        return folder

    @contextmanager
    def parts_of(self, folder: Path, world_size: int, only: list[int] | None = None) -> Iterator[Path]:
        """The checkpoint cut for so many ranks (or those of `only`), as long as the block lasts."""
        out = folder.with_name(f"{folder.name}-tp{world_size}")
        if not out.exists():
            if (folder / "model.safetensors").exists() and only is None:
                self._room((folder / "model.safetensors").stat().st_size, f"{folder.name} cut for {world_size}")
            self.say(f"cutting {folder.name} for {world_size} ranks")
        export(folder, out, world_size, ranks=only)
        try:
            yield out
        finally:
            if not self.keep:
                shutil.rmtree(out, ignore_errors=True)

    def _room(self, need: int, what: str) -> None:
        free = shutil.disk_usage(self.scratch).free
        if need > free:
            raise SystemExit(f"{self.scratch} has {free / 1e9:.0f} GB free, {what} needs {need / 1e9:.0f} GB: give --scratch another disk, "
                             "or --quick")


def main(run: Run) -> None:
    """tp 2 within 1 GiB a rank (quick: 512 MiB): peak, token time, and the disk alone."""
    if not run.record.missing("main", "run"):
        return
    budget = "512MiB" if run.quick else "1GiB"
    with run.parts_of(run.checkpoint(run.shape), 2) as parts:
        run.say(f"{run.shape}, 2 ranks, {budget} each")
        tokens, rounds = (5, 4) if run.quick else (4, 2)
        run.record.step("main", "run", lambda: {
            "model": run.shape, "ranks": run_ranks(ranks.generate, (str(parts), {"memory_budget": budget}, tokens, rounds), 2, threads=1)})


def bits(run: Run) -> None:
    """The 1B shape, streamed within 450 MiB and held: the same logits."""
    if not run.record.missing("bits", "run"):
        return
    with run.parts_of(run.checkpoint(SMALL), 2) as parts:
        run.say("1B shape: held, then streamed")

        def both() -> dict:
            held, streamed = (run_ranks(ranks.generate, (str(parts), options, 6), 2, threads=1)[0]
                              for options in ({}, {"memory_budget": "450MiB"}))
            return {"equal": held["logits"] == streamed["logits"] and held["tokens"] == streamed["tokens"], "tokens": len(held["tokens"]),
                    "compared": "all of it, by sha256",
                    "held_token_s": held["token_s"], "streamed_token_s": streamed["token_s"]}

        run.record.step("bits", "run", both)


def ablation(run: Run) -> None:
    """Windows of 1, 2, 3, 4, 8 blocks (quick: 1, 2, 4), nothing resident, the 1B shape on 2 ranks: a token, and a prompt of 64."""
    sizes, rounds = ([1, 2, 4], 2) if run.quick else (list(WINDOWS), 3)
    if not (run.record.missing("ablation", "held") or run.record.missing("ablation", "windows")):
        return
    with run.parts_of(run.checkpoint(SMALL), 2) as parts:
        run.say("weights held, for what products alone take")
        run.record.step("ablation", "held", lambda: run_ranks(windows.held, (str(parts), rounds), 2, threads=1)[0])
        run.say(f"windows of {', '.join(map(str, sizes))} blocks by turns")
        run.record.step("ablation", "windows", lambda: run_ranks(windows.by_turns, (str(parts), sizes, rounds), 2, threads=1))


def seventy(run: Run) -> None:
    """The 70B shape cut for 8, ranks 0 and 1 (quick: rank 0) one by one: one layer's files stand for all 80, read directly each time."""
    numbers = [rank for rank in ((0,) if run.quick else (0, 1)) if run.record.missing("seventy", f"rank {rank}")]
    if not numbers:
        return
    folder = run.checkpoint("llama2-70b", layers=1)
    with run.parts_of(folder, 8, [0, 1]) as parts:
        for rank in numbers:
            repeat_layer(parts / folder_name(rank, 8), shapes.config("llama2-70b"))
            run.say(f"70B shape, rank {rank} of 8")
            run.record.step("seventy", f"rank {rank}", lambda rank=rank: run_ranks(
                ranks.alone, (str(parts), rank, 8, {"memory_budget": "1GiB"}, 2 if run.quick else 3), 1, threads=2)[0])


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


def beside_accelerate(run: Run) -> None:
    """Four ranks and Accelerate's one process, each process with a disk of its own, then with the disk as it is."""
    reason = throttle.unavailable(run.scratch)
    if reason:
        run.say(f"reads are not limited: {reason}")
    limits = {"limited": run.throttle_mb_s, "as it is": None} if not reason else {"as it is": None}
    steps = [(name, who) for name in limits for who in ("ours", "Accelerate", *((accelerate.MORE,) if limits[name] is None else ()))
             if run.record.missing("accelerate", f"{name}, {who}")]
    if not steps:
        return
    throttle.sweep()
    folder, torch_bytes = run.checkpoint(run.shape), accelerate.torch_alone()
    for name, limit in limits.items():
        facts = {"model": run.shape, "mbytes_s": limit, "how": throttle.described() if limit else "", "torch_bytes": torch_bytes}
        if limit is None:
            if any(each == name for each, _ in steps):
                with run.parts_of(folder, accelerate.RANKS) as parts:
                    run.say(f"{accelerate.RANKS} ranks and Accelerate in turns, the disk {name}")
                    both = functools.cache(functools.partial(accelerate.by_turns, parts, folder, 3, 2))
                    for who in ("ours", accelerate.MORE, "Accelerate"):
                        run.record.step("accelerate", f"{name}, {who}", lambda who=who, facts=facts, both=both: facts | both()[who])
            continue
        if (name, "ours") in steps:
            with run.parts_of(folder, accelerate.RANKS) as parts:
                run.say(f"{accelerate.RANKS} ranks, the disk {name}")
                run.record.step("accelerate", f"{name}, ours", lambda limit=limit, facts=facts: facts | accelerate.ours(parts, limit, 4))
        if (name, "Accelerate") in steps:
            run.say(f"Accelerate, the disk {name}")
            tokens = 2 if limit and not run.quick else 4         # at 250 MB/s a token of the 7B shape is a minute
            run.record.step("accelerate", f"{name}, Accelerate", lambda limit=limit, facts=facts, tokens=tokens: facts | accelerate.theirs(
                folder, limit, tokens))


def behind_links(run: Run) -> None:
    """4 and 8 ranks (quick: 4) of the 1B shape over emulated 300 Mbit/s, 1 ms links, root only."""
    from links import links, unavailable

    rounds = len(over_links.WAYS) + 1                # every way is first, second, ... once
    counts = [count for count in ((4,) if run.quick else (4, 8)) if run.record.missing("links", f"{count} ranks")]
    if reason := unavailable():
        run.say(f"no emulated links: {reason}")
        return
    if not counts:
        return
    folder = run.checkpoint(SMALL)
    for count in counts:
        with links(count, over_links.RATE_MBIT, over_links.DELAY_MS) as network:
            run.say(f"{count} ranks behind links")
            run.record.step("links", f"{count} ranks", lambda network=network: over_links.measured(
                network, folder, 3 if run.quick else 5, rounds))


def machine() -> dict:
    """Where and when."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


PARTS = {"main": main, "bits": bits, "ablation": ablation, "accelerate": beside_accelerate, "seventy": seventy, "links": behind_links}
