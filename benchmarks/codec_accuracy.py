"""What the low-bit codecs cost a model: the loss on held-out text through real tensor parallelism, and a stress with LLM-like outliers.

Every variant runs the same windows of text through the same ranks; only what the all-reduces of o_proj and down_proj carry differs. So
differences are taken window by window, and their standard error is that of the difference, not of the loss.

    PYTHONPATH=.:backends python benchmarks/codec_accuracy.py --tp 4 8 --out docs/measured/codec_accuracy.md --json accuracy.json
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from hetero_attn.collectives.choice import Fixed, Route
from hetero_attn.collectives.codec import Calibration, Codecs
from hetero_attn.collectives.codec.calibration import BY_RANK, SiteRanges, from_bytes, total_range
from hetero_attn.collectives.codec.features import OUTLIER_SHARE, outliers_of
from hetero_attn.collectives.codec.measure import MovingRange
from hetero_attn.communicator import Communicator
from hetero_attn.models.calibration import RangeObserver, chunks_of, measure_ranges
from hetero_attn.models.load import load_model
from hetero_attn.models.tokenizer import Tokenizer
from hetero_attn.profile import load_profile
from hetero_attn.testing.ranks import on_ranks

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny-llama"
WINDOW, CHUNKS, CHUNK_TOKENS = 512, 256, 128
PIECE = 8                                            # windows run by one set of ranks


@dataclasses.dataclass(frozen=True)
class Texts:
    """Token ids: chunks to calibrate on, from the training files, and windows [WINDOW + 1] of the held-out ones."""

    chunks: list[list[int]]
    windows: list[list[int]]


def texts(windows: int) -> Texts:
    """Of the corpus that examples/tiny-llama was trained on; windows lie evenly over the held-out files."""
    sys.path.insert(0, str(ROOT / "examples"))
    from tiny_corpus import read_corpus

    tokenizer = Tokenizer.from_dir(TINY)
    train, held_out = read_corpus()
    sample = [token for _, text in train[:: max(1, len(train) // 64)] for token in tokenizer.encode(text, add_special_tokens=False)]
    rest = [token for _, text in held_out for token in tokenizer.encode(text, add_special_tokens=False)]
    return Texts(chunks_of(sample, CHUNKS, CHUNK_TOKENS, tokenizer.bos_id), chunks_of(rest, windows, WINDOW + 1, tokenizer.bos_id))


def with_outliers(calibration: Calibration, choose) -> Calibration:
    """The same ranges, and as outliers of each site what choose(ranges of the site) gives, int32 ascending."""
    sites = {site: dataclasses.replace(ranges, outliers=choose(ranges)) for site, ranges in calibration.sites.items()}
    return Calibration(calibration.world_size, sites, calibration.facts, calibration.row_factors)


def as_in_the_paper(calibration: Calibration) -> Calibration:
    """The same ranges and outliers, with the scales max(|min|, |max|) / 7 and no factors of rows."""
    sites = {site: SiteRanges.symmetric(each.lowest, each.highest, each.sum_lowest, each.sum_highest)
             for site, each in calibration.sites.items()}
    return Calibration(calibration.world_size, sites, calibration.facts, row_factors=False)


def none_kept(ranges: SiteRanges) -> torch.Tensor:
    return torch.empty(0, dtype=torch.int32)


def random_kept(seed: int):
    """As many features as the selection keeps, drawn anew at every site."""
    generator = torch.Generator().manual_seed(seed)

    def choose(ranges: SiteRanges) -> torch.Tensor:
        features = ranges.sum_lowest.numel()
        return torch.randperm(features, generator=generator)[: features // OUTLIER_SHARE].sort().values.to(torch.int32)

    return choose


def variants(calibration: Calibration, draws: int) -> Iterator[tuple[str, Route, Calibration]]:
    """(name, route, calibration). All draws of the random set are of one name."""
    once, twice = (lambda codec, algorithm=algorithm: Route(algorithm, codec) for algorithm in ("one_shot", "two_shot"))
    yield "bf16", once("none"), calibration
    yield "all INT4", once("int4_outliers"), with_outliers(calibration, none_kept)
    for draw in range(draws):
        yield "random 1/64 kept", once("int4_outliers"), with_outliers(calibration, random_kept(draw))
    yield "selected 1/64 kept", once("int4_outliers"), calibration
    yield "as in the paper: all INT4", once("int4_outliers"), with_outliers(as_in_the_paper(calibration), none_kept)
    yield "as in the paper: selected 1/64 kept", once("int4_outliers"), as_in_the_paper(calibration)
    yield "group-32 INT4", once("int4_group32"), calibration
    yield "group-32 INT8", once("int8_group32"), calibration
    yield "selected 1/64 kept, two-hop", twice("int4_outliers"), calibration
    yield "group-32 INT4, two-hop", twice("int4_group32"), calibration


def calibrate_in_rank(communicator: Communicator, chunks: list[list[int]]) -> bytes:
    """The calibration of examples/tiny-llama over these ranks, as Calibration.to_bytes() writes it; the same on every rank."""
    communicator.choice = Fixed(Route("one_shot"))
    ranges = measure_ranges(load_model(TINY, load_profile("cpu"), communicator=RangeObserver(communicator)), chunks)
    return Calibration(communicator.world_size, ranges).to_bytes()


def in_rank(communicator: Communicator, content: bytes, windows: list[list[int]], draws: int) -> dict:
    """name -> {losses: nats a token [runs][windows], bits, saturated [runs]}; the same on every rank."""
    communicator.choice = Fixed(Route("one_shot"))
    model = load_model(TINY, load_profile("cpu"), communicator=communicator)
    found: dict[str, dict] = {}
    for name, route, calibration in variants(from_bytes(content), draws):
        communicator.choice, communicator.codecs.calibration = Fixed(route), calibration
        communicator.codecs.traffic.sites.clear()
        losses = [window_loss(model, window) for window in windows]
        total = communicator.codecs.traffic.total()
        entry = found.setdefault(name, {"losses": [], "bits": total.bits_per_value or 16.0, "saturated": []})
        entry["losses"].append(losses)
        entry["saturated"].append(total.saturated_share)
    return found


def window_loss(model, window: list[int]) -> float:
    """Mean loss in nats a token over a window that starts without a past."""
    cache = model.new_cache(len(window) - 1, 1)
    step = cache.step([cache.add_sequence()], [len(window) - 1], torch.tensor(window[:-1]), last_only=False)
    return F.cross_entropy(model(step, cache).float(), torch.tensor(window[1:])).item()


def rows_of(found: dict[str, dict]) -> list[dict]:
    """A row a variant: its loss, NLL(bf16)/NLL(variant), and how much more it loses than bf16, with standard errors over windows.

    Random draws are averaged window by window; their own spread is told beside it.
    """
    base = torch.tensor(found["bf16"]["losses"], dtype=torch.float64)[0]
    rows = []
    for name, entry in found.items():
        runs = torch.tensor(entry["losses"], dtype=torch.float64)                              # [runs, windows]
        losses, means = runs.mean(0), runs.mean(1)
        rows.append({
            "variant": name, "runs": len(runs), "loss": losses.mean().item(), "kept_of_bf16": (base.mean() / losses.mean()).item(),
            "more_than_bf16": (losses - base).mean().item(), "standard_error": standard_error(losses - base),
            "spread_of_runs": means.std().item() if len(means) > 1 else 0.0, "bits_per_value": entry["bits"],
            "saturated": sum(entry["saturated"]) / len(entry["saturated"]),
        })
    return rows


def standard_error(differences: torch.Tensor) -> float:
    return (differences.std() / math.sqrt(differences.numel())).item() if differences.numel() > 1 else 0.0


def verdicts(found: dict[str, dict]) -> dict[str, bool]:
    """What is claimed: selected keeps 99 %, and is not behind random or all-INT4 by more than two standard errors of the difference."""
    losses = {name: torch.tensor(entry["losses"], dtype=torch.float64).mean(0) for name, entry in found.items()}
    selected = losses["selected 1/64 kept"]

    def not_behind(other: str) -> bool:
        behind = selected - losses[other]
        return behind.mean().item() <= 2 * standard_error(behind)

    return {
        "selected >= 99 % of bf16": (losses["bf16"].mean() / selected.mean()).item() >= 0.99,
        "selected not behind random": not_behind("random 1/64 kept"), "selected not behind all INT4": not_behind("all INT4"),
    }


def stress(world_size: int = 4, tokens: int = 512, features: int = 4096, share: float = 0.01, seed: int = 0) -> dict[str, float]:
    """Root mean square error of a sum of partials in which `share` of the features are 20 to 100 times the median, through the codecs.

    Scales come from other tokens of the same distribution than those that are measured.
    """
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.exp(0.3 * torch.randn(features, generator=generator))
    large = torch.randperm(features, generator=generator)[: round(share * features)]
    magnitude[large] = magnitude.median() * (20 + 80 * torch.rand(len(large), generator=generator))

    def batch() -> list[torch.Tensor]:
        return [torch.randn(tokens, features, generator=generator) * magnitude for _ in range(world_size)]

    moving = [MovingRange() for _ in range(world_size + 1)]
    for _ in range(8):
        parts = batch()
        for each, x in zip(moving, [*parts, sum(parts)]):
            each.update(x)
    by_rank = [torch.stack([getattr(each, part) for each in moving[:world_size]]) for part in BY_RANK]
    outliers = outliers_of(total_range(*by_rank[:2]))
    selected = Calibration(world_size, {"s": SiteRanges(*by_rank, *(getattr(moving[-1], part) for part in BY_RANK), outliers)})
    parts = batch()
    exact = sum(parts)
    kinds = {
        "all INT4": ("int4_outliers", with_outliers(selected, none_kept)),
        "random 1/64 kept": ("int4_outliers", with_outliers(selected, random_kept(seed))),
        "selected 1/64 kept": ("int4_outliers", selected), "group-32 INT4": ("int4_group32", None),
        "as in the paper: all INT4": ("int4_outliers", with_outliers(as_in_the_paper(selected), none_kept)),
        "as in the paper: selected 1/64 kept": ("int4_outliers", as_in_the_paper(selected)),
    }
    errors = {}
    for name, (codec, calibration) in kinds.items():
        payloads = []
        for rank, part in enumerate(parts):
            codecs = Codecs(rank, world_size)
            codecs.calibration = calibration
            coding = codecs.coding(codec, "s", features, torch.float32)
            payloads.append(coding.encode(part.flatten(), 0))
        total = coding.total(payloads, 0, exact.numel(), torch.float32).view_as(exact)
        errors[name] = (total - exact).pow(2).mean().sqrt().item()
    return errors


def markdown(results: dict) -> str:
    lines = [f"Accuracy of the low-bit codecs, {results['date']}, {results['machine']}", ""]
    for run in results["runs"]:
        lines += [f"### TP={run['tp']}: {run['windows']} held-out windows of {WINDOW} tokens, calibrated on {run['chunks']} chunks of "
                  f"{CHUNK_TOKENS}", "",
                  "| variant | bits | loss | NLL(bf16)/NLL | more than bf16 (± standard error) | spread of draws | saturated |",
                  "|---|---|---|---|---|---|---|"]
        lines += [f"| {row['variant']}{' (' + str(row['runs']) + ' draws)' if row['runs'] > 1 else ''} | {row['bits_per_value']:.2f} | "
                  f"{row['loss']:.4f} | {row['kept_of_bf16']:.2%} | {row['more_than_bf16']:+.4f} ± {row['standard_error']:.4f} | "
                  f"{row['spread_of_runs']:.4f} | {row['saturated']:.2%} |" for row in run["rows"]]
        lines += ["", *(f"- {'met' if met else 'NOT met'}: {claim}" for claim, met in run["verdicts"].items()), ""]
    lines += ["### Stress: 1 % of 4096 features are 20 to 100 times the median, 4 ranks", "",
              "| variant | RMSE | all INT4 / it |", "|---|---|---|"]
    worst = results["stress"]["all INT4"]
    lines += [f"| {name} | {error:.4f} | {worst / error:.1f} |" for name, error in results["stress"].items()]
    lines += [""]
    for kind in ("", "as in the paper: "):
        met = results["stress"][f"{kind}selected 1/64 kept"] <= results["stress"][f"{kind}all INT4"] / 5
        lines.append(f"- {'met' if met else 'NOT met'}: {kind}RMSE(selected) <= RMSE(all INT4) / 5")
    return "\n".join([*lines, ""])


class Unfinished(Exception):
    """Time was up before all windows had been run; what was run lies in the cache. The text says how much."""


def measure(tp: int, windows: int, draws: int, cache: Path | None, until: float, progress: Callable[[str], None]) -> dict:
    """One number of ranks -> a run as markdown() shows it, with its losses. In pieces of PIECE windows, kept in `cache` (None: nowhere).

    until: no piece begins after this moment of time.monotonic(); what is missing then raises Unfinished. Raises RuntimeError with a rank's
    traceback where one fails.
    """
    given = texts(windows)
    found: dict[str, dict] = {}
    begins = range(0, len(given.windows), PIECE)
    content = kept(cache, f"calibration-tp{tp}")
    for begin in begins:
        some = given.windows[begin : begin + PIECE]
        name = f"tp{tp}-draws{draws}-of{windows}-{begin}-{begin + len(some)}"
        if (piece := kept(cache, name)) is None:
            if time.monotonic() > until:
                raise Unfinished(f"TP={tp}: {begin} of {len(given.windows)} windows are done; run it again with the same cache")
            if content is None:
                progress(f"accuracy, TP={tp}: calibration on {len(given.chunks)} chunks")
                content = base64.b64encode(first_result(calibrate_in_rank, (given.chunks,), tp)).decode()
                keep(cache, f"calibration-tp{tp}", content)
            progress(f"accuracy, TP={tp}: windows {begin} to {begin + len(some)} of {len(given.windows)}, {draws} random draws")
            piece = first_result(in_rank, (base64.b64decode(content), some, draws), tp)
            keep(cache, name, piece)
        for variant, entry in piece.items():
            whole = found.setdefault(variant, {"losses": [[] for _ in entry["losses"]], "bits": entry["bits"], "shares": []})
            for all_of_run, more in zip(whole["losses"], entry["losses"]):
                all_of_run += more
            whole["shares"].append((len(some), sum(entry["saturated"]) / len(entry["saturated"])))
    for entry in found.values():
        shares = entry.pop("shares")
        entry["saturated"] = [sum(count * share for count, share in shares) / sum(count for count, _ in shares)]
    return {"tp": tp, "windows": len(given.windows), "chunks": len(given.chunks), "rows": rows_of(found), "verdicts": verdicts(found)}


def first_result(fn: Callable, args: tuple, ranks: int):
    """fn in every rank: rank 0's result. Raises RuntimeError with the first failed rank's traceback."""
    outcomes = on_ranks(fn, args, ranks, collective_timeout_s=120.0, timeout_s=3600.0)
    failed = next((outcome for outcome in outcomes if outcome.error), None)
    if failed:
        raise RuntimeError(failed.traceback or failed.text)
    return outcomes[0].result


def stamp() -> str:
    """A digest of what the losses depend on: the model, the codecs' and this measurement's text. A piece of another is not reused."""
    sources = [TINY / "model.safetensors", Path(__file__), *sorted((ROOT / "hetero_attn" / "collectives" / "codec").glob("*.py"))]
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def kept(cache: Path | None, name: str):
    """What keep() wrote under this name, None where it did not (or for other sources)."""
    file = cache and cache / f"{stamp()}-{name}.json"
    return json.loads(file.read_text()) if file and file.exists() else None


def keep(cache: Path | None, name: str, value) -> None:
    """Write it whole or not at all."""
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        part = cache / f".{name}.part"
        part.write_text(json.dumps(value))
        part.rename(cache / f"{stamp()}-{name}.json")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="loss of examples/tiny-llama through the low-bit codecs")
    parser.add_argument("--tp", type=int, nargs="*", default=[4, 8], metavar="N", help="numbers of ranks (4 8)")
    parser.add_argument("--windows", type=int, default=48, help=f"held-out windows of {WINDOW} tokens (48)")
    parser.add_argument("--draws", type=int, default=20, help="draws of the random set (20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables here too")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep what is done here, and take from it what was done before")
    parser.add_argument("--limit", type=float, default=math.inf, metavar="S",
                        help="begin nothing after S seconds; exit code 3 where something is left for another run with the same --cache")
    args = parser.parse_args(argv)
    for name in ("windows", "draws"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, expected at least 1")
    until = time.monotonic() + args.limit
    machine = f"{platform.machine()}, torch {torch.__version__}"
    results = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "stress": stress(), "runs": []}
    try:
        for tp in args.tp:
            results["runs"].append(measure(tp, args.windows, args.draws, args.cache, until, lambda text: print(text, file=sys.stderr)))
    except Unfinished as error:
        print(error, file=sys.stderr)
        return 3
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    text = markdown(results)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
