"""hetero-attn build: compile ahead of time what the backends would compile on first use.

Each backend declares its kernels (Backend.kernels); without --arch those that this machine will use are made. A kernel that fails does not
keep the others from being built: all of the compiler's words go to stderr, and the command ends with a line that names what failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_attn.cli.errors import CommandError, CommandFailed, one_line

if TYPE_CHECKING:
    from hetero_attn.jit import Kernel

Row = dict[str, Any]          # backend, name, arch, used_here, root, state, and where they apply digest, path, seconds, error


def add_parser(subparsers) -> argparse.ArgumentParser:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "build", help="compile the native kernels ahead of their first use",
        description="Compiles the kernels that the backends declare, into the user's cache or a folder.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--force", action="store_true", help="compile even what is there")
    what.add_argument("--list", action="store_true", help="show every declared kernel and whether it is built; build nothing")
    parser.add_argument("--arch", nargs="+", metavar="NAME", help="labels such as avx2, or 'all' (default: what this machine will use)")
    parser.add_argument("--backend", nargs="+", metavar="NAME", help="only these backends' kernels (default: every backend's)")
    parser.add_argument("--into", metavar="DIR", help="a folder instead of the user's cache, as a wheel carries it")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def run(args) -> int:
    """Builds or lists. Returns 0, 1 where backends could not say what they have and nothing else was there; raises CommandFailed if a
    kernel could not be built, after the others have been."""
    from hetero_attn.jit import cache_folder, compiler_reason

    declared, remarks = declared_kernels(args.backend)
    chosen = select(declared, args.arch, everything=args.list)
    into = Path(args.into).absolute() if args.into else None
    rows = []
    for backend, kernel in chosen:
        steps = Steps()
        row = {"backend": backend, "name": kernel.name, "arch": kernel.arch, "used_here": kernel.used_here, "root": str(kernel.root)}
        rows.append(row | (listed(kernel, into) if args.list else made(kernel, into, args.force, steps)))
        steps.end()
        if not args.json:
            print(as_text(rows[-1], chosen), flush=True)
    for backend, reason in remarks.items():
        print(f"hetero-attn: {backend}: {reason}", file=sys.stderr)
    if args.json:
        print(json.dumps({"kernels": rows, "into": str(into or cache_folder()), "compiler_reason": compiler_reason()}, indent=2))
    elif not chosen and not remarks:
        print("no backend declares a native kernel" + (" that this machine will use; --arch all builds the others" if declared else ""))
    failed = [row for row in rows if row["state"] == "failed"]
    if failed:
        words = dict.fromkeys(row["error"].splitlines()[0] for row in failed)
        raise CommandFailed(f"{len(failed)} of {len(rows)} native kernels could not be built: {'; '.join(words)}")
    return 1 if remarks and not rows else 0


def declared_kernels(only: list[str] | None = None) -> tuple[list[tuple[str, Kernel]], dict[str, str]]:
    """(backend name, kernel) of everything declared, in the backends' order; and backend name -> why one could not declare.

    only: the backends that are asked, None = all. An unknown name is a remark.
    """
    from hetero_attn import registry

    declared, remarks = [], {}
    for name in only or registry.names():
        try:
            declared += [(name, kernel) for kernel in registry.get(name).kernels()]
        except Exception as error:
            remarks[name] = f"its kernels() failed: {type(error).__name__}: {one_line(error)}"
    return declared, remarks


def select(declared: list[tuple[str, Kernel]], arches: list[str] | None, *, everything: bool = False) -> list[tuple[str, Kernel]]:
    """The kernels of these labels; None: those this machine will use (or `everything`). Raises CommandError for an unknown label."""
    if arches is None:
        return [(name, kernel) for name, kernel in declared if everything or kernel.used_here]
    known = sorted({kernel.arch for _, kernel in declared})
    for arch in arches:
        if arch != "all" and arch not in known:
            raise CommandError(f"--arch is {arch!r}, expected {', '.join(['all', *known])}")
    return [(name, kernel) for name, kernel in declared if "all" in arches or kernel.arch in arches]


def listed(kernel: Kernel, into: Path | None) -> Row:
    """What there is of a kernel: state prebuilt, cached or missing, and its path."""
    from hetero_attn.jit import BuildError

    try:
        path = kernel.find(into)
    except BuildError as error:
        return {"state": "failed", "error": str(error)}
    found = {"state": state_of(kernel, path), "path": str(path)} if path else {"state": "missing"}
    return found | {"digest": kernel.digest}


def made(kernel: Kernel, into: Path | None, force: bool, progress) -> Row:
    """Build a kernel: state built, cached, prebuilt or failed. One that this machine will use is loaded too, to see that it can be."""
    from hetero_attn.jit import BuildError

    started = time.perf_counter()
    try:
        before, digest = None if force else kernel.find(into), kernel.digest
        path = kernel.build(force=force, progress=progress, into=into)
        if kernel.used_here and not into:
            path = kernel.checked()
    except BuildError as error:
        if error.output:
            print("\n".join([*str(error).splitlines()[:2], error.output]), file=sys.stderr, flush=True)      # what, the command, all of it
        return {"state": "failed", "seconds": time.perf_counter() - started, "error": str(error)}
    state = state_of(kernel, path) if path == before else "built"
    return {"state": state, "seconds": time.perf_counter() - started, "path": str(path), "digest": digest}


def state_of(kernel: Kernel, path: Path) -> str:
    """'prebuilt' for an object that came with the sources, else 'cached'."""
    return "prebuilt" if path.is_relative_to(kernel.root) else "cached"


def as_text(row: Row, chosen: list[tuple[str, Kernel]]) -> str:
    """One line: name, arch, state, where; columns as wide as the chosen kernels need."""
    name_width = max(len(kernel.name) for _, kernel in chosen)
    arch_width = max(len(kernel.arch) for _, kernel in chosen)
    state = f"built in {row['seconds']:.1f} s" if row["state"] == "built" else row["state"]
    remark = "" if row["used_here"] else " (not used on this machine)"
    return f"{row['name']:<{name_width}}  {row['arch']:<{arch_width}}  {state:<15}  {row.get('path', '')}{remark}".rstrip()


class Steps:
    """A progress callback: the present step on one line of a terminal; silent where stderr is a file, since the rows tell enough."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def __call__(self, step: str) -> None:
        if self._shown:
            sys.stderr.write(f"\r{step} ...\x1b[K")
            sys.stderr.flush()

    def end(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
