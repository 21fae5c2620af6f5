"""hetero-attn generate: text from a model, on one rank or several.

The same command runs alone, starts N ranks of itself on this host (--tp N), or joins those that torchrun started, on any hosts. Text
goes to stdout as it comes, everything else to stderr.
"""

from __future__ import annotations

import argparse
import os
from functools import partial

from hetero_attn.cli.trust import add_trust

EPILOG = """examples:
  hetero-attn generate examples/tiny-llama --prompt 'def fibonacci(n):' --tp 2
  hetero-attn generate MODEL --prompt A --prompt B --json
  cat question.txt | hetero-attn generate MODEL --chat --system 'Be brief.' -
  hetero-attn generate MODEL --tp 2 --schedule weave --trace out.json --prompt-file long.txt
  torchrun --nnodes=2 --nproc-per-node=1 --rdzv-endpoint=HOST:PORT -m hetero_attn generate MODEL --trust-network --prompt A"""


class AddPrompt(argparse.Action):
    """--prompt and --prompt-file fill one list, in the order they stand on the command line."""

    def __call__(self, parser, namespace, value, option=None):
        kind = "text" if option == "--prompt" else "file"
        namespace.prompts = [*namespace.prompts, (kind, value)]


def add_parser(subparsers) -> argparse.ArgumentParser:
    """The subcommand's arguments."""
    parser = subparsers.add_parser(
        "generate", help="stream text from a Hugging Face model directory",
        description="Continues prompts, or holds a conversation (--chat). A lone - reads a prompt from standard input.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="directory with config.json, *.safetensors and tokenizer.json")
    parser.parse_known_args = partial(_with_standard_input, parser.parse_known_args)

    prompts = parser.add_argument_group("prompts (several make a batch)")
    prompts.add_argument("--prompt", dest="prompts", action=AddPrompt, default=[], metavar="TEXT")
    prompts.add_argument("--prompt-file", dest="prompts", action=AddPrompt, default=[], metavar="FILE",
                         help="UTF-8 text; - is standard input")
    prompts.add_argument("--chat", action="store_true", help="use the chat template; without a prompt: a conversation, one line a turn "
                                                            "(/reset forgets it, /exit ends it)")
    prompts.add_argument("--system", metavar="TEXT", help="system message of --chat")

    sampling = parser.add_argument_group("sampling (defaults: the model's generation_config.json, else greedy)")
    sampling.add_argument("--max-new-tokens", type=int, metavar="N", help="default 256")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    sampling.add_argument("--top-k", type=int, metavar="K", help="0 is off")
    sampling.add_argument("--top-p", type=float, metavar="P", help="1 is off")
    sampling.add_argument("--min-p", type=float, metavar="P", help="0 is off")
    sampling.add_argument("--repetition-penalty", type=float, metavar="R", help="1 is off")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the text before this string (repeatable)")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the end of the text")

    where = parser.add_argument_group("where it runs")
    where.add_argument("--tp", type=int, metavar="N", help="ranks to divide the model over; started here unless torchrun did")
    where.add_argument("--profile", metavar="NAME|FILE", help="device profile (default: detected)")
    where.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a profile value (repeatable)")
    where.add_argument("--backend", metavar="NAME", help="attention backend; it runs or the command fails")
    where.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="default: the profile's")
    where.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, npu")
    where.add_argument("--vocabulary", choices=["sharded", "master"], help="embedding and head over all ranks, or on rank 0")
    where.add_argument("--memory-budget", metavar="SIZE", help="memory of each rank's whole process, such as 3GiB: weights that do not fit "
                                                               "are streamed from the disk for every token")
    where.add_argument("--window", type=int, metavar="N", help="blocks of a layer (attention or MLP) that the streaming window holds "
                                                               "(default: what is quickest)")
    where.add_argument("--placement", metavar="WHERE", help="where the layers' KV lives: auto (on the device as far as it fits, "
                                                            "else in host memory), all-device, or how many layers' lie in host memory")
    where.add_argument("--device-memory", metavar="SIZE", help="memory of each rank's device that weights, activations and KV may "
                                                               "take, such as 14GiB (default: what is free)")
    where.add_argument("--schedule", choices=["plain", "weave", "tiled", "auto"],
                       help="how ranks run long steps: plain, one sum after the other; weave, in parts, one computed while another is "
                            "summed; tiled, products and sums in tiles; auto, what costs least (default: the profile's)")
    where.add_argument("--timeout", type=float, metavar="SECONDS", help="longest wait for another rank (the profile's timeout_s)")

    faults = parser.add_argument_group("faults and networks")
    faults.add_argument("--restart", action="store_true", help="when a rank is lost, go on from the last complete token: ranks of this "
                                                              "host are started again up to 3 times, torchrun's by its --max-restarts")
    add_trust(faults)

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout, at the end")
    output.add_argument("--echo", action="store_true", help="print each prompt before what continues it")
    output.add_argument("--no-stream", action="store_true", help="print the text when it is complete")
    output.add_argument("--trace", metavar="FILE", help="write what ran when on every rank, computing, communicating and copying KV, as a "
                                                        "Chrome trace (open it in ui.perfetto.dev)")
    output.add_argument("--progress", action="store_true", help="draw the loading bar even if stderr is not a terminal")
    return parser


def _with_standard_input(parse_known_args, args=None, namespace=None):
    """A lone - anywhere after MODEL is `--prompt-file -`; argparse takes an optional positional only right beside MODEL."""
    namespace, rest = parse_known_args(args, namespace)
    namespace.prompts = [*namespace.prompts, *[("file", word) for word in rest if word == "-"]]
    return namespace, [word for word in rest if word != "-"]


def run(args) -> int:
    """Checks the request, then runs it in this process or in ranks of its own. Returns the exit code."""
    from hetero_attn.cli.errors import CommandError
    from hetero_attn.cli.request import checked
    from hetero_attn.cli.work import in_own_ranks, work

    if args.tp is not None and args.tp < 1:
        raise CommandError(f"--tp is {args.tp}, expected at least 1")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, size = _joined(args)
        return work(checked(args, size, rank=rank))
    request = checked(args, args.tp or 1)
    return work(request) if request.tp == 1 else in_own_ranks(request)


def _joined(args) -> tuple[int, int]:
    """Rank and size of the group torchrun started. Raises CommandError when they are no such numbers or --tp is another."""
    from hetero_attn.cli.errors import CommandError

    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise CommandError(f"RANK is {rank!r} and WORLD_SIZE {size!r} in the environment, expected numbers with 0 <= RANK < WORLD_SIZE; "
                           "start the ranks with torchrun, or unset both")
    rank, size = int(rank), int(size)
    if args.tp not in (None, size):
        raise CommandError(f"--tp is {args.tp}, but torchrun started {size} ranks; leave --tp out, or start as many")
    return rank, size
