"""hetero-attn explain: what every backend says of a call, from shapes alone. No tensor is made, no device needed."""

from __future__ import annotations

import argparse
import json
import math

MASKS = ("bool", "float32", "float16", "bfloat16", "float64")

EPILOG = """example:
  hetero-attn explain --q 1,32,4096,128 --kv 1,8,4096,128 --dtype bfloat16 --causal --profile v100"""


def add_parser(subparsers) -> argparse.ArgumentParser:
    """The subcommand's arguments: the call's shapes and features, and the profile that judges."""
    parser = subparsers.add_parser(
        "explain", help="which backend runs a call, and why not the others",
        description="Judges an attention call by every backend, on this machine or for a device that is elsewhere.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    call = parser.add_argument_group("the call")
    call.add_argument("--q", required=True, metavar="B,Hq,Sq,D", help="shape of q")
    call.add_argument("--kv", required=True, metavar="B,Hkv,Skv,D", help="shape of k (and of v, but for --v-dim)")
    call.add_argument("--v-dim", type=int, metavar="Dv", help="v's head dimension (default: D)")
    call.add_argument("--dtype", default="float32", metavar="DTYPE", help="float32, float16, bfloat16 or float64")
    call.add_argument("--causal", action="store_true", help="bottom-right causal")
    call.add_argument("--scale", type=float)
    call.add_argument("--window", metavar="LEFT,RIGHT", default="-1,-1", help="inclusive; -1 is unlimited (write --window=-1,0)")
    call.add_argument("--softcap", type=float)
    call.add_argument("--alibi", choices=["heads", "batch"], help="slopes [Hq] or [B, Hq]")
    call.add_argument("--mask", choices=MASKS, help="dtype of an attn_mask")
    call.add_argument("--sinks", action="store_true")
    call.add_argument("--lse", action="store_true", help="return_lse")
    call.add_argument("--grad", action="store_true", help="gradients are wanted")
    call.add_argument("--layout", default="bhsd", help="bhsd or bshd: how the caller's memory lies")
    call.add_argument("--varlen", action="store_true", help="packed sequences: B sequences of at most Sq and Skv tokens")
    call.add_argument("--page-size", type=int, default=0, metavar="N", help="paged keys and values, N tokens a page (implies --varlen)")
    where = parser.add_argument_group("where")
    where.add_argument("--profile", metavar="NAME|FILE", help="device profile (default: detected)")
    where.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a value of the profile (repeatable)")
    where.add_argument("--device", metavar="TYPE", help="torch device type (default: the profile's)")
    where.add_argument("--backend", metavar="NAME", help="ask for one backend by name")
    parser.add_argument("--tiling", action="store_true", help="show how the profile's backends would cut the call for cores and buffers")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def run(args) -> int:
    """Prints the explanation. Returns 0 if a backend of this machine would run the call, else 1."""
    from hetero_attn import registry
    from hetero_attn.explain import explain_spec
    from hetero_attn.profile import load_profile

    known = args.device if args.device is None or args.device.partition(":")[0] in ("cpu", "cuda", "npu") else None
    profile = load_profile(args.profile, sets=args.set, device=known)        # mps, xpu: judged by this machine's best profile
    if args.backend:
        registry.get(args.backend)
    spec = spec_of(args, args.device or profile.device)
    explanation = explain_spec(spec, profile, args.backend)
    tilings = tilings_of(spec, profile, args.backend) if args.tiling else {}
    if args.json:
        shown = {name: tiling if isinstance(tiling, str) else tiling.to_dict() for name, tiling in tilings.items()}
        print(json.dumps(explanation.to_dict() | ({"tiling": shown} if args.tiling else {}), indent=2))
    else:
        print(explanation)
        for name, tiling in tilings.items():
            print(f"\ntiling by {name}\n{tiling}")
    return 0 if explanation.chosen else 1


def tilings_of(spec, profile, asked: str | None) -> dict:
    """Backend -> its tiling of the call, or the words why there is none; of the backend asked for, else of every one that plans tiles.
    Raises CommandError where none does."""
    from hetero_attn import registry
    from hetero_attn.backend import Backend
    from hetero_attn.cli.errors import CommandError

    names = [asked] if asked else registry.names()
    planning = [name for name in names if type(registry.find(name)).tiling is not Backend.tiling]
    if not planning:
        raise CommandError(f"--tiling: {', '.join(names)} plans no tiles from a profile's numbers; leave --backend out")
    found = {}
    for name in planning:
        try:
            tiling = registry.find(name).tiling(spec, profile)
        except ValueError as error:
            tiling = str(error)
        if tiling is not None:
            found[name] = tiling
    return found


def spec_of(args, device: str):
    """The AttentionSpec of parsed arguments. Raises CommandError."""
    import torch

    from hetero_attn.arguments import dense_spec, varlen_spec
    from hetero_attn.cli.errors import CommandError

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64, "bool": torch.bool}
    if args.dtype not in MASKS or args.dtype == "bool":
        raise CommandError(f"--dtype is {args.dtype!r}, expected one of {', '.join(m for m in MASKS if m != 'bool')}")
    B, Hq, Sq, D = _sizes("--q", args.q, "B,Hq,Sq,D")
    Bk, Hkv, Skv, Dk = _sizes("--kv", args.kv, "B,Hkv,Skv,D")
    window = _sizes("--window", args.window, "LEFT,RIGHT", least=-1)
    Dv = args.v_dim if args.v_dim is not None else Dk
    if Dv < 1:
        raise CommandError(f"--v-dim is {Dv}, expected at least 1")

    def tensor(*shape, dtype=dtypes[args.dtype]):
        return torch.empty(shape, dtype=dtype, device="meta")

    slopes = None if args.alibi is None else tensor(*((B, Hq) if args.alibi == "batch" else (Hq,)), dtype=torch.float32)
    sinks = tensor(Hq, dtype=torch.float32) if args.sinks else None
    options = (args.causal, args.scale, window, args.softcap, slopes, sinks, args.lse)
    try:
        if args.varlen or args.page_size:
            if args.mask:
                raise ValueError("--mask was given with --varlen; packed sequences take no attn_mask")
            if Bk != B:
                raise ValueError(f"batch sizes differ: --q has {B}, --kv has {Bk}")
            if args.page_size < 0:
                raise ValueError(f"--page-size is {args.page_size}, expected at least 1")
            starts = tensor(B + 1, dtype=torch.int32)
            table, used = None, None
            if args.page_size:
                blocks = -(-Skv // args.page_size)
                k, v = (tensor(B * blocks, args.page_size, Hkv, d) for d in (Dk, Dv))
                table, used = tensor(B, blocks, dtype=torch.int32), tensor(B, dtype=torch.int32)
            else:
                k, v = (tensor(B * Skv, Hkv, d) for d in (Dk, Dv))
            spec = varlen_spec(
                tensor(B * Sq, Hq, D), k, v, starts, None if args.page_size else starts, Sq, Skv, table, used, *options, args.grad
            )
        else:
            swap = (lambda t: t) if args.layout == "bhsd" else (lambda t: t.transpose(1, 2))
            mask = tensor(B, 1, Sq, Skv, dtype=dtypes[args.mask]) if args.mask else None
            q, k, v = (swap(t) for t in (tensor(B, Hq, Sq, D), tensor(Bk, Hkv, Skv, Dk), tensor(Bk, Hkv, Skv, Dv)))
            spec = dense_spec(q, k, v, mask, *options, args.layout, args.grad)
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from None
    from dataclasses import replace

    return replace(spec, device=device)


def _sizes(option: str, text: str, names: str, least: int = 0) -> tuple[int, ...]:
    from hetero_attn.cli.errors import CommandError

    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != len(names.split(",")) or min(sizes) < least:
        raise CommandError(f"{option} is {text!r}, expected {names}: {len(names.split(','))} integers of at least {least}")
    if math.prod(max(size, 1) for size in sizes) >= 2**56:               # beyond it the sizes of a tensor in bytes overflow in torch
        raise CommandError(f"{option} is {text!r}, expected {names} with a product below 2**56")
    return sizes
