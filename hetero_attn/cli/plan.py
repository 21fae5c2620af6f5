"""hetero-attn plan: who gets what of a model, whether it fits, and how long a token takes, before anything is copied or started."""

from __future__ import annotations

import argparse

EPILOG = """examples:
  hetero-attn plan MODEL --profile v100 --tp 4 --context 8192
  hetero-attn plan examples/shapes/pangu-38b --profile v100 --tp 8 --context 262144       KV of some layers in host memory
  hetero-attn plan MODEL --profile edge --tp 8 --per-host 1 --memory 1GiB --link 1ms,300Mbit \\
      --set hardware.memory_gbps=20 --set hardware.disk_gbps=0.5
  hetero-attn plan MODEL --hosts hosts.yaml             unlike ranks, each with its profile, device and memory"""


def add_parser(subparsers) -> argparse.ArgumentParser:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "plan", help="split a model over devices and predict memory and speed",
        description="Reads config.json, the headers of the weights and the devices' numbers; runs nothing.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="directory with config.json and *.safetensors")
    parser.add_argument("--profile", metavar="NAME|FILE", help="profile of every rank (default: detected)")
    parser.add_argument("--tp", type=int, metavar="N", help="number of ranks (default: 1)")
    parser.add_argument("--hosts", metavar="FILE", help="hosts.yaml: profile, device and memory of each rank, and the link")
    parser.add_argument("--context", type=int, metavar="C", help="tokens that the KV cache is to hold (default: 2048)")
    parser.add_argument("--memory", metavar="SIZE", help="memory that each rank may use, such as 3GiB (default: the device's; of "
                                                         "this machine's own CPU what is available now)")
    parser.add_argument("--device-memory", metavar="SIZE", help="memory of each rank's device, beside the host's own: what KV does not fit "
                                                                "lies in host memory (as generate has it)")
    parser.add_argument("--placement", metavar="WHERE", help="auto, all-device, or how many layers' KV lie in host memory (default: the "
                                                             "profile's)")
    parser.add_argument("--per-host", type=int, metavar="N", help="ranks of one host, which share its memory and disk "
                                                                     "(default: all; each CPU that --profile names by itself)")
    parser.add_argument("--link", metavar="LATENCY,RATE", help="the link between ranks, such as 1ms,300Mbit (default: as measured by tune)")
    parser.add_argument("--vocabulary", choices=["sharded", "master"], help="default: the profile's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a profile value (repeatable)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def run(args) -> int:
    """Plans and prints. Returns the exit code."""
    import json
    from dataclasses import replace

    from hetero_attn.models.planning import plan_model

    hosts, note = _hosts(args)
    found = plan_model(args.model, hosts, context=args.context, vocabulary=args.vocabulary)
    if note:
        found = replace(found, remarks=(note, *found.remarks))
    print(json.dumps(as_json(found)) if args.json else as_text(found))
    return 0


def _hosts(args):
    """The ranks that are asked for, and what is to be said of them ('': nothing)."""
    from hetero_attn.cli.errors import CommandError
    from hetero_attn.cli.request import placement_sets
    from hetero_attn.models.hosts import Host, Hosts, read_hosts
    from hetero_attn.profile import load_profile
    from hetero_attn.quantity import parse_bytes

    if args.context is not None and args.context < 1:
        raise CommandError(f"--context is {args.context}, expected at least 1 token")
    if args.hosts:
        for name in ("profile", "tp", "memory", "device_memory", "placement", "per_host", "link"):
            if getattr(args, name) is not None:
                raise CommandError(f"--{name.replace('_', '-')} is for ranks that are alike; with --hosts it stands in the file")
        if args.set:
            raise CommandError("--set is for ranks that are alike; with --hosts it stands in the file, under `set`")
        return read_hosts(args.hosts), ""
    count = 1 if args.tp is None else args.tp
    if count < 1:
        raise CommandError(f"--tp is {args.tp}, expected at least 1")
    each = count if args.per_host is None else args.per_host
    if each < 1:
        raise CommandError(f"--per-host is {args.per_host}, expected at least 1 rank")
    profile = load_profile(args.profile, sets=[*args.set, *placement_sets(args.placement, args.device_memory)], world_size=count)
    try:
        memory = None if args.memory is None else parse_bytes(args.memory)
    except ValueError as error:
        raise CommandError(f"--memory: {error}") from None
    named = count > each or (args.per_host is not None and profile.device == "cpu")     # ranks of a CPU with a name share it, see planning
    names, note = [f"host {rank // each}" if named else "" for rank in range(count)], ""
    if args.profile is None and profile.device == "cpu" and memory is None and profile.hardware.memory_gib is None:
        memory, note = of_this_host(each := min(each, count))
        names = [f"host {rank // each}" for rank in range(count)]                       # a name: its ranks share its processors
    hosts = tuple(Host(profile, profile.device, memory, name) for name in names)
    return Hosts(hosts, None if args.link is None else link_of(args.link)), note


def of_this_host(together: int) -> tuple[int | None, str]:
    """Bytes of memory that each of `together` ranks on this machine's processors has, and the words that say so; None: it does not tell."""
    from hetero_attn.models.placing import available_bytes
    from hetero_attn.quantity import shown_bytes

    available = available_bytes()
    if available is None:
        return None, ""
    note = f"memory is this host's, which has {shown_bytes(available)} available now"
    return available // together, note + (f"; its {together} ranks share it and its rate" if together > 1 else "")


def link_of(text: str):
    """'1ms,300Mbit' as a LinkModel. Raises CommandError."""
    import re

    from hetero_attn.cli.errors import CommandError
    from hetero_attn.collectives.cost import from_settings

    found = re.fullmatch(r"\s*([0-9.]+)\s*(us|ms|s)\s*,\s*([0-9.]+)\s*([MG])bit(?:/s)?\s*", text)
    try:
        latency = float(found[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[found[2]]
        rate = float(found[3]) * {"M": 1.0, "G": 1e3}[found[4]]
        if rate <= 0:
            raise ValueError
    except (TypeError, ValueError):
        raise CommandError(f"--link is {text!r}, expected latency and rate, as in 1ms,300Mbit") from None
    return from_settings(latency, 0.2, 0.0, rate, rate)                  # gloo's cost of a message, measured: docs/measured


def as_json(found) -> dict:
    """Everything, bytes and seconds."""
    from hetero_attn.cli.plan_cooperation import facts

    ranks = []
    for each in found.ranks:
        part = each.partition
        ranks.append({
            "rank": part.rank, "profile": each.host.profile.name, "device": each.host.device,
            **{name: [own.start, own.stop] if own else [0, 0] for name, own in zip(("q_heads", "kv_heads", "ffn", "vocab"), part.parts)},
            "weights": each.weights, "held": each.held, "streamed": each.streamed, "window": each.window, "cache": each.cache,
            "activations": each.activations, "process": each.process, "communicator": each.communicator, "total": each.total,
            "memory": each.memory, "compute_s": each.compute_s, "disk_s": each.disk_s,
        })
        if each.placement is not None:
            ranks[-1] |= {"device_layers": list(each.placement.device), "host_layers": list(each.placement.host),
                          "host_bytes": each.placement.host_bytes}
    return {"ranks": ranks, "context": found.context, "largest_context": found.largest_context, "first_token_s": found.first_token_s,
            "token_s": found.token_s, "reduce_s": found.reduce_s, "alone_s": found.alone_s, "algorithm": found.algorithm,
            "codec": found.codec, "communicator": found.communicator, "remarks": list(found.remarks),
            "cooperation": None if found.cooperation is None else facts(found.cooperation)}


def as_text(found) -> str:
    """The table and the lines below it."""
    from hetero_attn.cli.plan_cooperation import text
    from hetero_attn.models.planning import PROMPT
    from hetero_attn.quantity import shown_bytes, shown_seconds

    head = ["rank", "profile", "device", "q heads", "kv heads", "ffn", "vocab", "weights", "streamed", "held", "window", "KV",
            "activations", "process", "total", "of"]
    rows = [head]
    for each in found.ranks:
        part = each.partition
        sizes = (each.weights, each.streamed, each.held, each.window, each.cache, each.activations, each.process, each.total, each.memory)
        rows.append([str(part.rank), each.host.profile.name, each.host.device, *(str(len(own)) for own in part.parts),
                     *(shown_bytes(size) if size else "-" for size in sizes)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) if place in (1, 2) else cell.rjust(width)
                       for place, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]
    route = found.algorithm if found.codec == "none" else f"{found.algorithm} {found.codec}"
    where = "unified with the host's" if all(each.host.profile.device == "cpu" for each in found.ranks) else "the device's"
    if found.communicator:
        kept = shown_bytes(max(each.communicator for each in found.ranks))
        lines += ["", f"each total holds {kept} that the communicator of {found.communicator} keeps of the device, for tensors that all "
                      "ranks reach (symmetric_room_bytes, symmetric_heap_bytes)"]
    lines += ["", f"memory is {where}; KV cache for {found.context} tokens, the largest that fits is {found.largest_context}",
              f"first token of a prompt of {PROMPT}: {shown_seconds(found.first_token_s)}; each further one "
              + ("not known" if found.token_s is None else shown_seconds(found.token_s))
              + (f", of which sums between ranks {shown_seconds(found.reduce_s)} ({route})" if found.reduce_s else "")
              + (f"; one rank alone {shown_seconds(found.alone_s)}" if found.alone_s and len(found.ranks) > 1 else "")]
    if found.cooperation is not None:
        lines += text(found.cooperation)
    return "\n".join([*lines, *found.remarks])
