"""hetero-attn tune --schedule MODEL: what a layer and its sums cost on this machine and link, and from how many tokens on a cut pays.

Loads the model on the ranks, times a layer's pieces and sums, then runs real steps of a few layers by several cuts in turns. Costs and
thresholds go into the overlay of this profile, device, number of ranks and model, where `schedule: auto` (and `weave`) finds them, on the
same hosts and with the same dtype, codec and communicator. What cannot be measured is refused before any rank starts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_attn.cli.errors import CommandError
from hetero_attn.cli.trust import ask_for_token

if TYPE_CHECKING:
    from hetero_attn.models.schedule_sweep import Sweep
    from hetero_attn.profile import DeviceProfile

BUDGET_S = 30.0                                      # for the steps; the pieces take a few seconds beside


def check(profile: DeviceProfile, model: str, rank: int, world_size: int, *, show: bool = False) -> None:
    """Raises CommandError or ModelError for a model that cannot be run so, or by a profile under which nothing is to be tuned."""
    from hetero_attn.cli.request import check_weights
    from hetero_attn.models.load import open_model, own_partition
    from hetero_attn.models.shard_folder import rank_folder

    config, checkpoint = open_model(rank_folder(model, rank, world_size))
    if show:
        return
    if profile.memory_budget is not None or profile.window is not None:
        raise CommandError("a model whose weights are streamed is always run plain, so there is no schedule to tune; leave memory_budget "
                           "and window out")
    vocabulary = (checkpoint.manifest or profile).vocabulary
    check_weights(config, checkpoint, rank, world_size, vocabulary, own_partition(checkpoint, rank, world_size, vocabulary))


def work(model: str, profile: DeviceProfile, device: str | None, as_json: bool, dry_run: bool) -> int:
    """One rank's part: join, load, measure; rank 0 writes the overlay and prints."""
    import dataclasses

    import torch

    from hetero_attn.collectives import init_communicator
    from hetero_attn.models.load import load_model
    from hetero_attn.models.schedule_measure import measure_costs
    from hetero_attn.models.schedule_setup import codec_routes
    from hetero_attn.models.schedule_sweep import sweep
    from hetero_attn.profile import save_overlay

    if profile.threads_per_rank:
        torch.set_num_threads(profile.threads_per_rank)
    plain = dataclasses.replace(profile, schedule="plain")
    with init_communicator(plain, device=device) as communicator:
        ask_for_token(communicator)
        first = communicator.rank == 0

        def progress(text: str) -> None:
            if first and not as_json:
                print(text, file=sys.stderr, flush=True)

        progress("loading the model")
        decoder = load_model(model, plain, communicator=communicator)
        began = time.perf_counter()
        progress("timing a layer's pieces and its sums")
        costs = measure_costs(decoder, use_codec=codec_routes(communicator, profile.codec))
        found = sweep(decoder, plain, costs, BUDGET_S, progress)
        seconds = time.perf_counter() - began
        if not first:
            return 0
        path = None
        if not dry_run:
            note = f"hetero-attn tune --schedule, {time.strftime('%Y-%m-%d')}, {seconds:.1f} s"
            path = save_overlay(profile, found.settings(), device=device, world_size=communicator.world_size,
                                model=Path(model).resolve().name, notes={"overlap.measured": note})
        report(found, as_json, {"measured_in_s": round(seconds, 2), "overlay": str(path) if path else None})
        if path and not as_json:
            print(f"\nwritten to {path}", file=sys.stderr)
    return 0


def show(profile: DeviceProfile, model: str, world_size: int, as_json: bool) -> None:
    """Print what the overlay holds. Raises CommandError where it holds nothing."""
    from dataclasses import asdict

    if not profile.overlap.measured:
        raise CommandError(f"profile {profile.name!r} has no measured schedule of {model} for {world_size} ranks; run "
                           f"hetero-attn tune --schedule {model} --tp {world_size}")
    values = asdict(profile.overlap) | {"origin": profile.origins["overlap.measured"]}
    if as_json:
        print(json.dumps(values))
        return
    print("\n".join(f"{name}: {value}" for name, value in values.items() if name != "measured"))
    print("\n".join(profile.overlap.measured), flush=True)


def report(found: Sweep, as_json: bool, facts: dict[str, Any]) -> None:
    """The table on stdout, for a person or as JSON."""
    print(json.dumps(found.as_json() | facts) if as_json else found.as_text(), flush=True)
