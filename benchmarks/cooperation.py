"""CPU-GPU cooperation run for real on host tensors, under an enforced device budget: make bench-cooperation, or --help.

One random model runs one long prompt and decodes after it, with all KV on the "device", with a device memory that holds half of the
layers' KV, and with all KV on the host. The ways take turns, chunk by chunk and token by token, and every logit is compared. Device and
host are the same memory and the same processor here: what is measured is what copies and bookkeeping cost, not what a device would gain.
--write puts the run beside those of other contexts in docs/measured. Exit code: 0; 1 a line fails; 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "backends")]

from cpu import machine  # noqa: E402
from overlap.model import Shape, random_decoder  # noqa: E402

from hetero_attn.communicator import SoloCommunicator  # noqa: E402
from hetero_attn.models.cache import PagedCache  # noqa: E402
from hetero_attn.models.placing import make_placing, weight_bytes  # noqa: E402
from hetero_attn.parallel.placement import ALL_DEVICE, AUTO, DeviceMemoryError  # noqa: E402
from hetero_attn.profile import load_profile  # noqa: E402
from hetero_attn.quantity import shown_bytes, shown_seconds  # noqa: E402
from hetero_attn.testing.cooperation import Way, limits, prepare, run  # noqa: E402

SHAPE = Shape(hidden=1024, layers=16, ffn=2816, q_heads=16, kv_heads=16, vocab=4096, dtype="bfloat16")
SLOWER = 1.15                   # a prompt or token may take so many times that of all KV on the device: copies beside it, nothing more


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=8192, help="tokens of the prompt (default: 8192)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens decoded after it (default: 16)")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a chunk (default: 512)")
    parser.add_argument("--ways", nargs="+", choices=["all-device", "half", "all-host"], default=["all-device", "half", "all-host"])
    parser.add_argument("--write", action="store_true", help="write docs/measured/cooperation.md and .json")
    found = parser.parse_args()
    if found.context < found.chunk or found.tokens < 1 or found.ways[0] != "all-device":
        parser.error("expected --context of at least a chunk, a token, and all-device as the first way")
    return found


def telling(total: int):
    """Progress on stderr."""
    return lambda done: print(f"\r{done} of {total} tokens", end="\n" if done == total else "", file=sys.stderr, flush=True)


def facts_of(way: Way, first: Way, decoder) -> dict:
    """What is told of a way, bytes and seconds."""
    last, traffic, account = way.placing.last, way.placing.traffic, way.placing.account
    return {
        "way": way.name, "placement": str(last), "device_layers": len(last.device), "host_layers": len(last.host),
        "device_bytes": last.device_bytes, "host_bytes": last.host_bytes, "device_memory": account.limit,
        "device_peak": account.peak if account.limit else account.peak + weight_bytes(decoder),
        "prompt_s": sum(way.chunk_s), "token_s": median(way.token_s),
        **dict(zip(("prompt_ratio", "token_ratio"), way.ratios(first))),
        "fetched": traffic.fetched, "stored": traffic.stored, "crossed": traffic.crossed,
    }


def largest(decoder, profile, limit: int) -> dict[str, int]:
    """Tokens of one sequence that this device memory holds without and with cooperation; each tried, and one block more refused."""
    found = {}
    for name, asked in (("all-device", ALL_DEVICE), ("cooperation", AUTO)):
        placing = make_placing(decoder, profile, asked, limit)
        most = placing.tokens(1)[0]
        decoder.placing = placing
        placing.place(decoder, PagedCache.blocks_for(most, 1, decoder.kv_block_size), 1)
        try:
            placing.place(decoder, PagedCache.blocks_for(most, 1, decoder.kv_block_size) + 70, 1)   # a huge page's worth of blocks
        except DeviceMemoryError:
            found[name] = most
    return found


def main() -> int:
    args = arguments()
    profile = load_profile("cpu", sets=[f"prefill_chunk={args.chunk}"])
    decoder = random_decoder(SHAPE, SoloCommunicator(), profile)
    tokens = args.context + args.tokens
    asked = limits(decoder, tokens)
    before = machine.describe("cpu", torch.get_num_threads())
    ways = [prepare(decoder, name, *asked[name], tokens) for name in args.ways]
    prompt = torch.randint(3, SHAPE.vocab, (args.context,), generator=torch.Generator().manual_seed(2)).tolist()
    run(decoder, ways, prompt, args.tokens, args.chunk, telling(tokens))
    apart = max(max(way.prompt_apart, way.token_apart) for way in ways)
    rows = [facts_of(way, ways[0], decoder) for way in ways]
    report = {"machine": before, "shape": vars(SHAPE), "context": args.context, "chunk": args.chunk, "tokens": args.tokens, "apart": apart,
              "weights": weight_bytes(decoder), "ways": rows, "largest": largest(decoder, profile, asked["half"][1])}
    runs = {str(args.context): report}
    if args.write:
        file = ROOT / "docs/measured/cooperation.json"
        runs = (json.loads(file.read_text()) if file.exists() else {}) | runs
        file.write_text(json.dumps(runs, indent=1) + "\n")
        (ROOT / "docs/measured/cooperation.md").write_text(markdown(runs))
    print(markdown(runs))
    return 0 if all(passed for _, passed in verdicts(report)) else 1


def verdicts(report: dict) -> list[tuple[str, bool]]:
    """(what was asked for and what came out, whether it holds)."""
    found = [(f"largest difference of any logit from all-device's, over {report['context']} tokens and {report['tokens']} decoded: "
              f"{report['apart']:g} (0: equal to the bit)", report["apart"] == 0)]
    for row in report["ways"][1:]:
        if row["device_memory"] is not None:
            found.append((f"{row['way']}: device memory {shown_bytes(row['device_peak'])} at most, of {shown_bytes(row['device_memory'])}",
                          row["device_peak"] <= row["device_memory"]))
        found.append((f"{row['way']}: a chunk {row['prompt_ratio']:.2f} and a token {row['token_ratio']:.2f} of all-device's time (at most "
                      f"{SLOWER})", max(row["prompt_ratio"], row["token_ratio"]) <= SLOWER))
    return found


def markdown(runs: dict[str, dict]) -> str:
    """The report of all runs, by context."""
    shape = next(iter(runs.values()))["shape"]
    lines = [
        "# Cooperation on host tensors", "",
        '`make bench-cooperation`. **Both sides are the same host**: "device" and "host" are parts of one memory, attended by one '
        "processor, and the device's part is held to a budget. No accelerator took part.", "",
        f"A random model: {shape['layers']} layers, hidden {shape['hidden']}, {shape['kv_heads']} KV heads of "
        f"{shape['hidden'] // shape['q_heads']}, {shape['dtype']}. The ways take turns, chunk by chunk and token by token; ratios are "
        "medians."]
    for context in sorted(runs, key=int):
        lines += ["", *section(runs[context])]
    return "\n".join(lines) + "\n"


def section(report: dict) -> list[str]:
    """One run."""
    most = report["largest"]
    lines = [f"## A prompt of {report['context']} tokens in chunks of {report['chunk']}, {report['tokens']} tokens decoded", "",
             machine.headline(report["machine"]), "",
             *(f"- {'pass' if passed else 'FAIL'}: {text}" for text, passed in verdicts(report)), "",
             "| KV of layers | device | host | prompt | a chunk | token | a token | fetched | stored | q, k, v, o |",
             "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in report["ways"]:
        sizes = [shown_bytes(row[name]) for name in ("device_bytes", "host_bytes", "fetched", "stored", "crossed")]
        cells = [f"{row['way']}: {row['device_layers']} on device, {row['host_layers']} on host", *sizes[:2], f"{row['prompt_s']:.1f} s",
                 f"{row['prompt_ratio']:.2f}", shown_seconds(row["token_s"]), f"{row['token_ratio']:.2f}", *sizes[2:]]
        lines.append(f"| {' | '.join(cells)} |")
    half = next((row for row in report["ways"] if row["device_memory"]), None)
    if half is not None:
        lines += ["", f"Within the {shown_bytes(half['device_memory'])} of `half` ({shown_bytes(report['weights'])} are weights), "
                      f"{most.get('all-device', '?')} tokens fit with all KV on the device, {most.get('cooperation', '?')} with "
                      "cooperation (placed, and refused beyond)."]
    return lines


if __name__ == "__main__":
    sys.exit(main())
