"""The attention suite on one backend and device, without pytest: python -m hetero_attn.testing.gpu.conform --backend triton --device cuda

Prints one JSON object on the last line: how many cases passed, how many the backend objected to, and what failed. It is run in a process of
its own, because a kernel that reads where it must not can take the whole device context with it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from hetero_attn.backend import UnsupportedError
from hetero_attn.testing.attention import check
from hetero_attn.testing.attention_cases import attention_cases, plain_cases

FLUSHED = 20                                         # cases between two summaries on the way
SHOWN = 20                                           # failures that are kept


def cases_of(share: int, few: bool) -> list:
    """The reduced grid, every `share`-th of it, or (few) some small cases of each kind."""
    cases = attention_cases()
    if few:
        kinds = ("plain-", "causal-5x49", "paged-16-everything", "varlen-mixed-everything", "everything-49x5", "window-decode")
        return [case for case in cases if case.name.startswith(kinds) and not case.gradients]
    return plain_cases() + cases[len(plain_cases()) :: share]


def conform(backend: str, device: str, cases: list, progress: bool = False) -> dict:
    """{"passed", "objected", "failures", "failed": {case: text}, "seconds", "whole"} of one backend. progress: on the way, so that a child
    that is stopped has said what it did."""
    begin, passed, objected, failed = time.perf_counter(), 0, 0, {}
    for index, case in enumerate(cases):
        try:
            check(case, backend, device)
            passed += 1
        except UnsupportedError:
            objected += 1
        except Exception as error:
            failed[case.name] = f"{type(error).__name__}: {error}"[:1500]
        if progress and (index + 1) % FLUSHED == 0:
            print(json.dumps(_summary(backend, device, passed, objected, failed, begin, False)), flush=True)
        if progress and sys.stderr.isatty():
            print(f"\r{backend}: {index + 1} of {len(cases)}, {len(failed)} failed", end="", file=sys.stderr, flush=True)
    if progress and sys.stderr.isatty():
        print(file=sys.stderr)
    return _summary(backend, device, passed, objected, failed, begin, True)


def _summary(backend: str, device: str, passed: int, objected: int, failed: dict[str, str], begin: float, whole: bool) -> dict:
    return {"backend": backend, "device": device, "passed": passed, "objected": objected, "failures": len(failed),
            "failed": dict(list(failed.items())[:SHOWN]), "seconds": round(time.perf_counter() - begin, 1), "whole": whole}


def part_of(text: str) -> tuple[int, int]:
    """'1/4' -> (1, 4): the second of four. Raises ValueError."""
    part, parts = (int(number) for number in text.split("/"))
    if not 0 <= part < parts:
        raise ValueError(f"part {part} of {parts}")
    return part, parts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hetero_attn.testing.gpu.conform", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--share", type=int, default=1, help="one case in so many of the grid")
    parser.add_argument("--few", action="store_true", help="some small cases of each kind (for compute-sanitizer)")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th case from number I on (default 0/1, all)")
    args = parser.parse_args(argv)
    try:
        part, parts = part_of(args.part)
    except ValueError:
        parser.error(f"--part {args.part}: expected I/N with 0 <= I < N, as in 0/4")
    if args.share < 1:
        parser.error(f"--share {args.share}: expected 1 or more")
    found = conform(args.backend, args.device, cases_of(args.share, args.few)[part::parts], progress=True)
    print(json.dumps(found))
    return 1 if found["failures"] or not found["passed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
