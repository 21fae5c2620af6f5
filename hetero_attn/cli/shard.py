"""hetero-attn shard: cut a checkpoint into one folder a rank, each with its own slices and nothing else.

A worker's machine then needs its own folder only, and reads it front to back: column slices, which lie across the checkpoint, lie together.
"""

from __future__ import annotations

import argparse

EPILOG = """examples:
  hetero-attn shard MODEL --tp 4 --out parts            then copy parts/rank-2-of-4 to the third machine
  hetero-attn generate parts --tp 4 --prompt A          all ranks on this host
  torchrun --nnodes=4 --nproc-per-node=1 --rdzv-endpoint=HOST:PORT -m hetero_attn generate parts --trust-network --prompt A
  hetero-attn shard --check parts/rank-2-of-4           compare every checksum after copying"""


def add_parser(subparsers) -> argparse.ArgumentParser:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "shard", help="cut a checkpoint into one folder a rank",
        description="Writes DIR/rank-R-of-N for every rank: its slices in safetensors files with checksums. Run again, an interrupted "
                    "export goes on where it stopped, and what is damaged is written anew.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="directory with config.json and *.safetensors (with --check: a rank's folder)")
    parser.add_argument("--tp", type=int, metavar="N", help="number of ranks")
    parser.add_argument("--out", metavar="DIR", help="where the ranks' folders go")
    parser.add_argument("--rank", type=int, action="append", metavar="R", help="write this rank's folder only (repeatable)")
    parser.add_argument("--vocabulary", choices=["sharded", "master"], default="master",
                        help="embedding and head over all ranks, or with rank 0 alone (default)")
    parser.add_argument("--hosts", metavar="FILE", help="hosts.yaml: cut in proportion to the devices' speed, as hetero-attn plan shows it")
    parser.add_argument("--check", action="store_true", help="compare MODEL's checksums, write nothing")
    parser.add_argument("--progress", action="store_true", help="draw the bar even if stderr is not a terminal")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def run(args) -> int:
    """Exports or checks. Returns the exit code."""
    import json
    from pathlib import Path

    from hetero_attn.cli.errors import CommandError
    from hetero_attn.cli.progress import ByteProgress
    from hetero_attn.models import export
    from hetero_attn.quantity import shown_bytes

    bar = True if args.progress else None
    if args.check:
        if args.out or args.tp or args.hosts:
            raise CommandError("--check reads a folder: leave --out, --tp and --hosts out")
        read = export.check(Path(args.model), ByteProgress("checking", bar=bar))
        told = f"{args.model}: {shown_bytes(read)} as they were exported"
        print(json.dumps({"folder": args.model, "bytes": read}) if args.json else told)
        return 0
    partitions = None
    if args.hosts:
        from hetero_attn.models.planning import read_hosts, split_for

        hosts = read_hosts(args.hosts)
        if args.tp not in (None, len(hosts.ranks)):
            raise CommandError(f"--tp is {args.tp}, {args.hosts} names {len(hosts.ranks)} ranks; leave --tp out")
        args.tp, partitions = len(hosts.ranks), split_for(args.model, hosts, args.vocabulary)
    if not args.out or not args.tp:
        raise CommandError("an export needs --tp N (or --hosts FILE) and --out DIR")
    if args.tp < 1:
        raise CommandError(f"--tp is {args.tp}, expected at least 1")
    for rank in args.rank or ():
        if not 0 <= rank < args.tp:
            raise CommandError(f"--rank is {rank}, expected 0 to {args.tp - 1}")
    made = export.export(args.model, args.out, args.tp, vocabulary=args.vocabulary, ranks=args.rank, partitions=partitions,
                         progress=ByteProgress("cutting", bar=bar))
    if args.json:
        print(json.dumps([{"folder": str(each.folder), "written": each.written, "kept": each.kept} for each in made]))
        return 0
    for each in made:
        before = f" ({shown_bytes(each.kept)} were there)" if each.kept else ""
        print(f"{each.folder}: {shown_bytes(each.written)} written{before}")
    return 0
