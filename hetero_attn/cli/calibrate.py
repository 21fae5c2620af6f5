"""hetero-attn calibrate: measure the ranges of a model's partial sums under TP, which the codec int4_outliers needs.

The result goes beside the user's overlay, for this profile, device, number of ranks and model, where `codec: int4_outliers` finds it. Alone
the command starts its ranks here (--tp N); under torchrun every rank runs it, and rank 0 reads the text, writes and speaks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hetero_attn.cli.errors import CommandError, CommandFailed
from hetero_attn.cli.trust import add_trust, ask_for_token, need_trust

if TYPE_CHECKING:
    from hetero_attn.profile import DeviceProfile

EPILOG = """examples:
  hetero-attn calibrate examples/tiny-llama --text README.md --tp 2
  hetero-attn generate examples/tiny-llama --prompt 'def f(' --tp 2 --set codec=int4_outliers"""


@dataclasses.dataclass(frozen=True)
class Order:
    """A checked command line. Plain values: it is sent to ranks."""

    model: Path
    text: Path
    profile: DeviceProfile
    world_size: int
    chunks: int
    chunk_tokens: int
    dtype: str | None
    device: str | None
    json: bool


def add_parser(subparsers) -> argparse.ArgumentParser:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "calibrate", help="measure a model's ranges for the 4-bit codec of its collectives",
        description="Runs text through a model divided over ranks, and keeps the range of every feature of the partial sums of each o_proj "
                    "and down_proj: the scales of codec int4_outliers.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="directory with config.json, *.safetensors and tokenizer.json")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="UTF-8 text of the kind the model will see")
    parser.add_argument("--tp", type=int, metavar="N", help="number of ranks; started here unless torchrun did")
    parser.add_argument("--chunks", type=int, default=256, metavar="N", help="most chunks of text to run (256)")
    parser.add_argument("--chunk-tokens", type=int, default=128, metavar="N", help="tokens of a chunk (128)")
    parser.add_argument("--profile", metavar="NAME|FILE", help="device profile (default: detected)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a profile value (repeatable)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="default: the profile's")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, npu")
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def run(args) -> int:
    """Checks the request, measures and writes. Returns the exit code."""
    from hetero_attn.collectives import rendezvous
    from hetero_attn.parallel.launch import RankFailure, run_ranks

    env = rendezvous.world()
    joined = "RANK" in os.environ and env.world_size > 1
    if joined and args.tp not in (None, env.world_size):
        raise CommandError(f"--tp is {args.tp}, and torchrun started {env.world_size} ranks; leave --tp out")
    order = checked(args, env.world_size if joined else args.tp, reads_text=env.rank == 0)
    if joined:
        need_trust(args.trust_network, "calibrate")
        return work(order)
    try:
        return run_ranks(work, (order,), order.world_size, threads=order.profile.threads_per_rank or None)[0]
    except RankFailure as error:
        failed = CommandFailed(str(error))
        failed.add_note(error.traceback)
        raise failed from None


def checked(args, world_size: int | None, *, reads_text: bool) -> Order:
    """The Order of parsed arguments: whatever can be known to be wrong is, before a rank starts. Raises CommandError, ModelError."""
    from hetero_attn.communicator import Communicator
    from hetero_attn.models.config import ModelConfig
    from hetero_attn.models.decoder import Decoder
    from hetero_attn.profile import load_profile

    if world_size is None or world_size < 2:
        raise CommandError(f"--tp is {world_size}, expected at least 2 ranks: one has no partial sums to send"
                           if world_size is not None else "give --tp N, or start the ranks with torchrun: one rank sends nothing")
    if args.chunks < 1 or args.chunk_tokens < 2:
        raise CommandError(f"--chunks is {args.chunks} and --chunk-tokens {args.chunk_tokens}, expected at least 1 and at least 2")
    config = ModelConfig.from_dir(args.model)
    if args.chunk_tokens > config.context_length:
        raise CommandError(f"--chunk-tokens is {args.chunk_tokens}, the model's context has {config.context_length}")
    profile = load_profile(args.profile, sets=args.set, device=args.device, world_size=world_size, model=config.path.resolve().name)
    import torch

    Decoder(config, Communicator(0, world_size, device="meta"), dtype=torch.float32, device="meta")    # a world size it cannot be cut for
    order = Order(args.model, args.text, profile, world_size, args.chunks, args.chunk_tokens, args.dtype, args.device, args.json)
    if reads_text:
        read_chunks(order)
    return order


def read_chunks(order: Order) -> list[list[int]]:
    """The token ids of the text's chunks. Raises CommandError for a text that cannot be read or is too short for one."""
    from hetero_attn.models.calibration import chunks_of
    from hetero_attn.models.tokenizer import Tokenizer

    try:
        text = order.text.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"text {order.text} is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise CommandError(f"text {order.text} cannot be read: {error.strerror}") from None
    tokenizer = Tokenizer.from_dir(order.model)
    begin = tokenizer.bos_id if tokenizer.encode("")[:1] == [tokenizer.bos_id] else None
    ids = tokenizer.encode(text, add_special_tokens=False)
    chunks = chunks_of(ids, order.chunks, order.chunk_tokens, begin)
    if not chunks:
        raise CommandError(f"text {order.text} has {len(ids)} tokens, expected at least one chunk of {order.chunk_tokens}; "
                           "give a longer text or a smaller --chunk-tokens")
    return chunks


def work(order: Order) -> int:
    """One rank's part: join, load, run the text; rank 0 writes the file and prints."""
    import torch

    from hetero_attn.collectives import init_communicator
    from hetero_attn.collectives.codec.calibration import Calibration, calibration_path
    from hetero_attn.models.calibration import SITE, RangeObserver, key_of, measure_ranges, model_fingerprint
    from hetero_attn.models.load import load_model

    plain = dataclasses.replace(order.profile, codec="none", schedule="plain")      # nothing but the text is to be watched
    began = time.perf_counter()
    with init_communicator(plain, device=order.device) as communicator:
        ask_for_token(communicator)
        model = load_model(order.model, plain, communicator=RangeObserver(communicator), dtype=order.dtype)
        own = torch.tensor(read_chunks(order)) if communicator.rank == 0 else torch.empty(0, 0, dtype=torch.int64)     # [chunks, tokens]
        shape = communicator.broadcast(torch.tensor(list(own.shape)), site=SITE).tolist()
        if model.vocabulary == "sharded":
            own = communicator.broadcast(own if communicator.rank == 0 else torch.empty(shape, dtype=torch.int64), site=SITE)
        elif communicator.rank:                                          # the text is rank 0's alone: its length is enough
            own = torch.zeros(shape, dtype=torch.int64)
        chunks = own.tolist()
        found = measure_ranges(model, chunks, Progress(len(chunks), shape[1]) if communicator.rank == 0 else None)
        if communicator.rank:
            return 0
        facts = {
            "model": order.model.resolve().name, "fingerprint": model_fingerprint(order.model), "date": time.strftime("%Y-%m-%d"),
            "text": order.text.name, "chunks": len(chunks), "chunk_tokens": shape[1], "dtype": str(model.dtype).removeprefix("torch."),
            "seconds": round(time.perf_counter() - began, 2),
        }
        calibration = Calibration(communicator.world_size, found, facts)
        path = calibration_path(key_of(order.profile, order.model, communicator.world_size, order.device))
        calibration.write(path)
        report(calibration, path, order)
    return 0


class Progress:
    """Chunks done: a line that grows on a terminal, one at the end elsewhere. On stderr."""

    def __init__(self, total: int, tokens: int) -> None:
        self._text, self._began, self._bar = f"of {total} chunks of {tokens} tokens", time.perf_counter(), sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        line = f"calibrating: {done} {self._text}, {time.perf_counter() - self._began:.1f} s"
        if self._bar:
            print(f"\r{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done == total:
            print(line, file=sys.stderr, flush=True)


def report(calibration, path: Path, order: Order) -> None:
    """The table on stdout, for a person or as JSON."""
    from hetero_attn.models.calibration import summary

    rows = summary(calibration)
    if order.json:
        print(json.dumps({"world_size": calibration.world_size, **calibration.facts, "file": str(path), "sites": rows}), flush=True)
        return
    width = max(len(row["site"]) for row in rows)
    print(f"{calibration.facts['model']}, {calibration.world_size} ranks, {calibration.facts['chunks']} chunks of "
          f"{calibration.facts['chunk_tokens']} tokens; R is a feature's range, summed over the ranks")
    print(f"{'site':<{width}}  features  median R  largest R  beyond 2x median  outliers  bits/value")
    for row in rows:
        print(f"{row['site']:<{width}}  {row['features']:>8}  {row['median_range']:>8.3g}  {row['largest_range']:>9.3g}  "
              f"{row['beyond_twice_median']:>16.2%}  {row['outliers']:>8}  {row['bits_per_value']:>10.4f}")
    values = sum(row["features"] for row in rows)
    bits = sum(row["bits_per_value"] * row["features"] for row in rows) / values
    print(f"{len(rows)} sites, {bits:.4f} bits a value on average, and a byte a message; use it with --set codec=int4_outliers")
    print(f"written to {path}", file=sys.stderr, flush=True)
