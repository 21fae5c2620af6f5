"""hetero-attn tune: measure the link between the ranks and choose an algorithm for every size of message.

The result goes into the user's overlay, for this profile, device and number of ranks, where `algorithm: auto` finds it; it holds for the
hosts it was measured on. Alone the command starts its ranks here (--tp N); under torchrun every rank runs it, on whatever hosts, and rank 0
writes and speaks. --show prints what was measured before, and how the choice follows from it. With --schedule MODEL it is the model's
schedule that is measured (tune_schedule.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_attn.cli.errors import CommandError, CommandFailed
from hetero_attn.cli.trust import add_trust, ask_for_token, need_trust

if TYPE_CHECKING:
    from hetero_attn.collectives.tuning import Survey
    from hetero_attn.profile import DeviceProfile

EPILOG = """examples:
  hetero-attn tune --tp 2
  hetero-attn tune --tp 2 --show
  hetero-attn tune --tp 2 --show --set codec=auto --model examples/tiny-llama
  hetero-attn tune --tp 2 --schedule MODEL
  torchrun --nnodes=4 --nproc-per-node=1 --rdzv-endpoint=HOST:PORT -m hetero_attn tune --trust-network"""


def add_parser(subparsers) -> argparse.ArgumentParser:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "tune", help="measure the link between ranks and choose the algorithms of collectives",
        description="Measures latency, bandwidth and the cost of a message between ranks, times the likeliest algorithms, and keeps the "
                    "table in the user's overlay.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tp", type=int, metavar="N", help="number of ranks; started here unless torchrun did")
    parser.add_argument("--schedule", metavar="MODEL", help="measure a model's layers and sums instead: when does a cut pay?")
    parser.add_argument("--show", action="store_true", help="print the table of what was measured before; measure nothing")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, write nothing")
    parser.add_argument("--model", metavar="MODEL", type=Path, help="with --show: whose calibration codec auto and int4_outliers have")
    parser.add_argument("--profile", metavar="NAME|FILE", help="device profile (default: detected)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a profile value (repeatable)")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, npu")
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def run(args) -> int:
    """Measures and writes, or shows. Returns the exit code."""
    from hetero_attn.collectives import rendezvous
    from hetero_attn.parallel.launch import RankFailure, run_ranks
    from hetero_attn.profile import load_profile

    env = rendezvous.world()
    joined = "RANK" in os.environ and env.world_size > 1
    if joined and args.tp not in (None, env.world_size):
        raise CommandError(f"--tp is {args.tp}, and torchrun started {env.world_size} ranks; leave --tp out")
    world_size = env.world_size if joined else args.tp
    if world_size is None:
        raise CommandError("there is one rank, which sends nothing; give --tp N, or start the ranks with torchrun")
    if world_size < 2:
        raise CommandError(f"--tp is {world_size}, expected at least 2 ranks: one sends nothing")
    measure, call = work, ()
    model = None
    if args.schedule is not None:
        from hetero_attn.cli import tune_schedule

        model = Path(args.schedule).resolve().name
        measure, call = tune_schedule.work, (args.schedule,)
    profile = load_profile(args.profile, sets=args.set, device=args.device, world_size=world_size, model=model)
    if args.model is not None and not args.show:
        raise CommandError("--model is given without --show; what is measured here is the link, which no model changes")
    if args.schedule is not None:
        tune_schedule.check(profile, args.schedule, env.rank if joined else 0, world_size, show=args.show)
    if args.show:
        if env.rank == 0 and args.schedule is not None:
            tune_schedule.show(profile, args.schedule, world_size, args.json)
        elif env.rank == 0:
            show(profile, world_size, args.model, args.device, args.json)
        return 0
    call = (*call, profile, args.device, args.json, args.dry_run)
    if joined:
        need_trust(args.trust_network, "tune")
        return measure(*call)
    try:
        return run_ranks(measure, call, world_size, threads=profile.threads_per_rank or None)[0]
    except RankFailure as error:
        failed = CommandFailed(str(error))
        failed.add_note(error.traceback)
        raise failed from None


def work(profile: DeviceProfile, device: str | None, as_json: bool, dry_run: bool) -> int:
    """One rank's part: join, measure; rank 0 writes the overlay and prints."""
    from hetero_attn.collectives import init_communicator, tuning
    from hetero_attn.profile import save_overlay

    plain = dataclasses.replace(profile, algorithm="native", codec="none", communicators=("distributed",))
    with init_communicator(plain, device=device) as communicator:
        ask_for_token(communicator)
        began = time.perf_counter()
        found = tuning.survey(communicator, tuning.gather_hosts(communicator), tuning.THOROUGH)
        found = dataclasses.replace(found, codecs=tuning.measure_codecs(communicator, tuning.codecs_of(profile.codec)))
        seconds = time.perf_counter() - began
        if communicator.rank:
            return 0
        path = None
        if not dry_run:
            note = f"hetero-attn tune, {time.strftime('%Y-%m-%d')}, {seconds:.1f} s"
            path = save_overlay(profile, found.settings(), device=device, world_size=found.world_size, notes={"link.latency_ms": note})
        report(found, profile, as_json, {"measured_in_s": round(seconds, 2), "overlay": str(path) if path else None})
        if path and not as_json:
            print(f"\nwritten to {path}", file=sys.stderr)
    return 0


def show(profile: DeviceProfile, world_size: int, model: Path | None, device: str | None, as_json: bool) -> None:
    """Print what the overlay holds, and the choice that follows. Codecs are timed here and now: they cost processor time and no link.

    Raises CommandError where nothing was measured, ModelError for a model without a calibration under codec int4_outliers.
    """
    from hetero_attn.collectives import tuning
    from hetero_attn.collectives.link import codec_costs
    from hetero_attn.models.calibration import calibration_for_show

    found = tuning.from_profile(profile.link, world_size)
    if found is None:
        raise CommandError(f"profile {profile.name!r} has no measured link for {world_size} ranks; run hetero-attn tune --tp {world_size}")
    calibration = None if model is None else calibration_for_show(profile, model, world_size, device)
    names = tuning.codecs_of(profile.codec, calibrated=calibration is not None)
    found = dataclasses.replace(found, codecs=codec_costs(0, world_size, names, calibration))
    report(found, profile, as_json, {"origin": profile.origins["link.latency_ms"]})


def report(found: Survey, profile: DeviceProfile, as_json: bool, facts: dict[str, Any]) -> None:
    """The table on stdout, for a person or as JSON."""
    from hetero_attn.collectives import listing

    allowed = {"algorithm": profile.algorithm, "codec": profile.codec}
    if as_json:
        print(json.dumps(listing.as_json(found, **allowed) | facts))
    else:
        print(listing.as_text(found, **allowed), flush=True)
