"""The hetero-attn command: one subcommand a file, each with add_parser(subparsers) and run(args) -> exit code.

Whatever goes wrong ends here, in errors.report: one line on stderr and an exit code.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence

from hetero_attn.cli import build, calibrate, doctor, explain, generate, plan, shard, tune
from hetero_attn.cli.errors import CommandError, report

SUBCOMMANDS = (build, calibrate, doctor, explain, generate, plan, shard, tune)


class Parser(argparse.ArgumentParser):
    """argparse, with a wrong argument as an exception like any other error, and no guessing at shortened options."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str):
        raise CommandError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args=None, namespace=None):
        """Raises CommandError; an option that its subcommand does not have is answered with the nearest one that it has."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            own = getattr(found, "parser", self)
            near = difflib.get_close_matches(unknown[0].partition("=")[0], own._option_string_actions, n=1)
            own.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
        return found


def parser() -> Parser:
    """The whole command line."""
    from hetero_attn import __version__

    top = Parser(prog="hetero-attn", description="One attention call and one set of collectives over unlike accelerators.")
    top.add_argument("--version", action="version", version=f"hetero-attn {__version__}")
    subparsers = top.add_subparsers(metavar="COMMAND", required=True)
    for subcommand in SUBCOMMANDS:
        subcommand.add_parser(subparsers)
        own = subparsers.choices[subcommand.__name__.rpartition(".")[2]]
        own.set_defaults(run=subcommand.run, parser=own)
    return top


def open_missing_streams() -> None:
    """The null device for each standard stream that was closed (<&-), before a file or socket gets its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # Files take the lowest free number: in this order, the stream's own. Not closed with the Python object: ranks inherit it.
            number = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (None: this process's) and returns its exit code."""
    open_missing_streams()
    try:
        args = parser().parse_args(argv)
        code = args.run(args)
        sys.stdout.flush()              # here a reader that has gone is still an error to be reported quietly
        return code
    except (Exception, KeyboardInterrupt) as error:
        return report(error)
