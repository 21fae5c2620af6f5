"""python -m hetero_attn.testing.gpu [--only NAMES] [--quick] [--minutes M] [--json FILE] [--page FILE]: check and measure this GPU.

Exit code 0: all passed; 1: one failed, is below its bar, or all were skipped; 2: bad arguments; 3: no GPU here, or a package is missing.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

NO_DEVICE = 3

try:
    from hetero_attn.testing.gpu import checks
    from hetero_attn.testing.gpu.outcome import BELOW, FAILED, SKIPPED, Outcome
    from hetero_attn.testing.gpu.page import page_path, text_of, versions, written
except ModuleNotFoundError as missing:               # of the base installation; what else may be absent is found out by the checks
    print(f"gpu-check needs {missing.name or missing}, which is not installed here; it needs torch, pyyaml, numpy and safetensors, "
          "and neither pytest nor this project's own installation")
    raise SystemExit(NO_DEVICE) from None


def need() -> str | None:
    """In one line what this machine lacks; None = it may begin."""
    if torch.cuda.is_available():
        return None
    named = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    build = " ".join(f"{name} {version}" for name, version in named.items() if version) or "neither CUDA nor ROCm"
    return (f"gpu-check needs a GPU that torch sees (CUDA or ROCm), its driver, and triton; here torch {torch.__version__} has {build} "
            f"and sees no device")


def arguments(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m hetero_attn.testing.gpu", description="Check and measure this GPU.")
    parser.add_argument("--only", metavar="NAMES", help="these checks, separated by commas (see --list)")
    parser.add_argument("--quick", action="store_true", help="a twelfth of the suite, fewer shapes and rounds")
    parser.add_argument("--minutes", type=float, default=checks.MINUTES, help="of the whole run (default %(default)g)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--page", type=Path, metavar="FILE", help="where the page goes (default: docs/measured/<device>.md)")
    parser.add_argument("--list", action="store_true", help="name the checks")
    parser.add_argument("--rehearse", action="store_true", help="go through the motions on the CPU (needs --page)")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    parser, args = arguments(argv)
    if args.list:
        print("\n".join(f"{check.name:12} {check.about}" for check in checks.CHECKS))
        return 0
    with orderly_end():
        return checked(parser, args)


@contextmanager
def orderly_end() -> Iterator[None]:
    """What would end this process at once ends its children first: Python unwinds. What it ignores (nohup) it goes on ignoring."""
    def leave(number, frame):
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)
              if signal.getsignal(number) not in (signal.SIG_IGN, None)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def checked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run what was asked for; the exit code."""
    try:
        wanted = checks.selected(args.only)
    except ValueError as error:
        parser.error(f"--only {args.only!r}: {error}")
    if not args.rehearse and (lacking := need()):
        print(lacking)
        return NO_DEVICE
    if args.rehearse and args.page is None:
        parser.error("--rehearse: name a --page; a rehearsal is not to lie among measurements")
    device = torch.device("cpu") if args.rehearse else torch.device("cuda", torch.cuda.current_device())
    name = "CPU" if args.rehearse else torch.cuda.get_device_name(device)
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g}: expected more than 0")
    page = args.page or page_path(name)
    for option, target in (("--page", page), ("--json", args.json)):
        if target is not None and not target.parent.is_dir():
            parser.error(f"{option} {target}: the folder {target.parent} does not exist")
    run = checks.Run(device, args.quick, deadline=time.monotonic() + 60 * args.minutes)
    outcomes: dict[str, Outcome] = {}
    for check in wanted:
        print(f"{check.name} ...", file=sys.stderr, flush=True)
        outcomes[check.name] = checks.carried_out(check, run)
        print(f"{check.name}: {outcomes[check.name].status}", *(f"  {line}" for line in outcomes[check.name].text.splitlines()),
              *(f"  {figure}" for figure in outcomes[check.name].figures), sep="\n", flush=True)
    known = versions()
    written(page, text_of(name, known, outcomes, quick=args.quick, rehearsal=args.rehearse))
    print(f"written: {page}", file=sys.stderr)
    if args.json:
        verdicts = {each: outcome.to_dict() for each, outcome in outcomes.items()}
        found = {"device": name, "versions": known, "quick": args.quick, "rehearsal": args.rehearse, "checks": verdicts}
        written(args.json, json.dumps(found, indent=1) + "\n")
    if all(outcome.status == SKIPPED for outcome in outcomes.values()):
        print("every check was skipped", file=sys.stderr)
        return 1
    return 1 if any(outcome.status in (FAILED, BELOW) for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
