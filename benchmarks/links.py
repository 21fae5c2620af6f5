"""Ranks behind emulated links on this host: N network namespaces, a full-duplex link each, of a given rate and delay.

    python benchmarks/links.py --ranks 4 --rate 300 --delay 1 --prove
    python benchmarks/links.py --ranks 4 --rate 300 --delay 1 -- python my_program.py --its --arguments

The first measures what the links are. The second runs a command in every namespace under torchrun's environment (RANK, WORLD_SIZE,
LOCAL_WORLD_SIZE=1, MASTER_ADDR, MASTER_PORT) with GLOO_SOCKET_IFNAME, its output after `[rank]`. Root only; what was made is removed,
however it ends. Exit code: 0; 1 a rank failed or the links do not keep their promise; 2 wrong arguments; 3 not possible here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

from links import LinksError, RankError, links, unavailable  # noqa: E402  (the package of this name, not this file)
from links.prove import broken_promises, prove, show, show_counters  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rate", type=float, default=300.0, metavar="MBIT", help="10^6 bit/s of each link, each way (default: 300)")
    parser.add_argument("--delay", type=float, default=1.0, metavar="MS", help="one-way delay between any two (default: 1)")
    parser.add_argument("--mtu", type=int, default=9000, help="bytes of the largest IP packet (default: 9000)")
    parser.add_argument("--queue", type=float, default=200.0, metavar="MS", help="longest wait for a receiver's port (default: 200)")
    parser.add_argument("--via", choices=("auto", "switch", "netem"), default="auto", help="what carries packets (default: netem if there)")
    parser.add_argument("--prove", action="store_true", help="measure the links and print that (without a command: always)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each measurement of --prove (default: 1)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="limit for the command (default: 600)")
    parser.add_argument("--counters", action="store_true", help="at the end, print what each port carried and dropped")
    parser.add_argument("--json", action="store_true", help="print measurements and counters as one JSON object, last")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and a command to run in every namespace")
    parsed = parser.parse_args()
    if parsed.command[:1] == ["--"]:
        del parsed.command[0]
    if not 0.2 <= parsed.seconds <= 60:
        parser.error(f"--seconds is {parsed.seconds:g}, expected 0.2 to 60")
    return parsed


def main() -> int:
    asked = arguments()
    if reason := unavailable():
        print(f"links: skipped: {reason}", file=sys.stderr)
        return 3
    report: dict[str, object] = {}
    failed = False
    try:
        with links(asked.ranks, asked.rate, asked.delay, mtu=asked.mtu, queue_ms=asked.queue, via=asked.via) as network:
            if asked.prove or not asked.command:
                report["proof"] = proof = prove(network, asked.seconds)
                broken = report["broken"] = broken_promises(proof)
                failed = bool(broken)
                words = "\n".join([show(proof), *(f"  NOT KEPT: {each}" for each in broken)])
                print(words, file=sys.stderr if asked.json else sys.stdout, flush=True)
            if asked.command:
                network.run(asked.command, timeout_s=asked.timeout, on_line=lambda rank, line: print(f"[{rank}] {line}", flush=True))
            report["counters"] = counters = network.counters()
            if asked.counters:
                print(show_counters(counters), file=sys.stderr if asked.json else sys.stdout, flush=True)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except RankError as error:
        print(f"rank {error.rank} failed: {error.reason}", file=sys.stderr)
        return 1
    except LinksError as error:
        print(error, file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    if asked.json:
        print(json.dumps(report))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
