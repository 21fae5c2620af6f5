"""What generate prints: text as it comes on stdout, speed on stderr, or one JSON object on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hetero_attn.cli.request import Request
from hetero_attn.collectives.codec import Traffic
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.generate import Generation, Piece
from hetero_attn.parallel.placement import Placement, spread
from hetero_attn.parallel.schedule_choice import Auto, Plain, Tiled, Weave
from hetero_attn.quantity import shown_bytes
from hetero_attn.spec import dtype_name


class TextPrinter:
    """Prints pieces in the prompts' order: the first unfinished prompt's as they come, the later ones' when their turn is there.

    Several prompts get a heading each, and where `echo` holds the prompts, their text too. stream=False holds a text back until it is
    complete. skip: characters that an earlier start of the same command has shown; `shown` counts all, theirs included.
    """

    def __init__(self, count: int, *, stream: bool = True, echo: Sequence[str] = (), file=None, skip: int = 0):
        self.shown, self._skip = 0, skip
        self._count, self._stream, self._file = count, stream, file or sys.stdout
        self._texts, self._ended = [""] * count, [False] * count
        self._echo = echo
        self._turn = 0
        self._written = ""
        self._head()

    def __call__(self, piece: Piece) -> None:
        self._texts[piece.index] += piece.text
        self._ended[piece.index] |= piece.done is not None
        while self._turn < self._count:
            if self._stream or self._ended[self._turn]:
                self._write(self._texts[self._turn])
                self._texts[self._turn] = ""
            if not self._ended[self._turn]:
                return
            if not self._written.endswith("\n"):
                self._write("\n")
            self._turn += 1
            self._head()

    def _head(self) -> None:
        if self._count > 1 and self._turn < self._count:
            self._write(f"==> prompt {self._turn + 1} <==\n")
        if self._echo and self._turn < self._count:
            self._write(self._echo[self._turn])
        self._written = ""

    def _write(self, text: str) -> None:
        if text:
            fresh = text[max(0, self._skip - self.shown) :]
            self.shown += len(text)
            if fresh:
                self._file.write(fresh)
                self._file.flush()
            self._written = text


def speed(results: Sequence[Generation]) -> dict[str, float]:
    """tokens of all results, seconds to the first one, and tokens/s after it over all sequences (0 when there was only one step);
    prefill: prompt tokens of all sequences by the seconds until the last of them had its first token."""
    tokens = sum(len(result.token_ids) for result in results)
    first = min((result.first_token_s for result in results if result.token_ids), default=0.0)
    last = max((result.total_s for result in results), default=0.0)
    started = sum(1 for result in results if result.token_ids)
    rate = (tokens - started) / (last - first) if tokens > started and last > first else 0.0
    slowest = max((result.first_token_s for result in results if result.token_ids), default=0.0)
    prefill = sum(result.prompt_tokens for result in results if result.token_ids) / slowest if slowest else 0.0
    return {"tokens": tokens, "first_token_s": first, "prefill_tokens_per_s": prefill, "tokens_per_s": rate}


def report_speed(request: Request, results: Sequence[Generation]) -> None:
    """One line on stderr."""
    if not results:
        return
    total = speed(results[-1:] if request.interactive else results)
    where = f"tp {request.tp}, backend {request.runs_on}, profile {request.profile.name}, {dtype_name(request.dtype)}"
    print(f"{total['tokens']} tokens, first token after {total['first_token_s']:.2f} s, {total['tokens_per_s']:.1f} tokens/s ({where})",
          file=sys.stderr, flush=True)


def report_peaks(peaks: Sequence[dict[str, int]]) -> None:
    """A line a rank on stderr: what it was predicted to hold at most, and what it held."""
    for rank, peak in enumerate(peaks):
        limit = f", budget {shown_bytes(peak['budget'])}" if peak["budget"] else ""
        print(f"rank {rank}: peak memory {shown_bytes(peak['measured'])} (predicted {shown_bytes(peak['predicted'])}{limit})",
              file=sys.stderr, flush=True)


def report_placements(placements: Sequence[dict[str, int]]) -> None:
    """A line a rank on stderr: which layers' KV lay where, and what went over the bus for it."""
    for rank, each in enumerate(placements):
        found = Placement(each["layers"], spread(each["layers"], each["host_layers"]))
        sizes = f"{shown_bytes(each['device_bytes'])} of the device" + (
            f", {shown_bytes(each['host_bytes'])} of the host; prompts stored {shown_bytes(each['stored'])} and fetched "
            f"{shown_bytes(each['fetched'])}, decoding sent {shown_bytes(each['crossed'])}" if each["host_layers"] else "")
        limit = f"; device memory at most {shown_bytes(each['device_peak'])} of {shown_bytes(each['device_memory'])}" if each[
            "device_memory"] else ""
        print(f"rank {rank}: KV of {found}: {sizes}{limit}", file=sys.stderr, flush=True)


def report_trace(request: Request, model: Decoder, *, empty: bool) -> None:
    """One line on stderr: the file, and where nothing went on beside computing why not, and what to set. empty: nothing is in it."""
    reason = "" if model.recorder.overlapped or (model.communicator.world_size == 1 and not empty) else uncut(model, empty)
    if reason and empty:
        reason = f"nothing is in it: {reason}, and all KV lay on the device"
    print(f"trace: {request.trace}" + (f" ({reason})" if reason else ""), file=sys.stderr, flush=True)


def uncut(model: Decoder, empty: bool) -> str:
    """Why a model that has run cut none of its steps, and what would have cut one. empty: none was long enough to be taken down either."""
    schedule, chunk = model.schedule, model.profile.prefill_chunk
    if model.communicator.world_size == 1:
        return "one rank sums nothing"
    if model.window is not None:
        return "no step is cut where weights are streamed"
    if not isinstance(schedule, Plain):
        return "the device overlaps products and sums by itself"
    places, key = schedule.places, f"overlap.min_tokens{'_moe' if model.config.experts else ''}"
    remedy = "give a longer prompt, or" if places.min_tokens <= chunk else f"steps take up to {chunk};"
    remedy += f" --set {key}=N"
    if isinstance(schedule, (Weave, Tiled)):
        return f"no step had the {places.min_tokens} tokens from which {schedule.name} cuts: {remedy}"
    if isinstance(schedule, Auto):
        return (f"auto cut no step: none had {places.min_tokens} tokens, or it would not have paid; {remedy}, and --schedule weave to cut "
                "in any case")
    short = f", and none had the {places.shard_tokens} tokens (overlap.shard_tokens) from which plain ones are shown" if empty else ""
    return f"every step ran plain{short}; --schedule weave cuts those of {places.min_tokens} tokens and more: {remedy}"


def placement_facts(placements: Sequence[dict[str, int]]) -> list[dict[str, Any]]:
    """Each rank's placement for --json: the layers by number."""
    each_host = [spread(each["layers"], each["host_layers"]) for each in placements]
    return [{name: value for name, value in each.items() if name != "layers"}
            | {"host_layers": list(host), "device_layers": list(Placement(each["layers"], host).device)}
            for each, host in zip(placements, each_host)]


def report_json(
    request: Request, results: Sequence[Generation], load_s: float, traffic: Traffic | None = None, peaks: Sequence[dict[str, int]] = (),
    placements: Sequence[dict[str, int]] = (),
) -> None:
    """The one object on stdout; results are in the prompts' (or turns') order. traffic: of rank 0's codecs, if it has any. peaks: bytes of
    every rank, under `memory`; placements: where each rank's KV lay, [] where nothing bounded it."""
    facts = {
        "model": str(request.model), "profile": request.profile.name, "backend": request.runs_on, "device": request.profile.device,
        "dtype": dtype_name(request.dtype), "vocabulary": request.vocabulary, "tp": request.tp, "seed": request.params.seed,
        "load_s": load_s, **speed(results), "codec": codec_facts(traffic), "memory": list(peaks),
        "placement": placement_facts(placements),
        "results": [_as_dict(place, result) for place, result in enumerate(results)],
    }
    json.dump(facts, sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def codec_facts(traffic: Traffic | None) -> dict[str, Any] | None:
    """What went through lossy codecs on this rank, all sites together and those where values saturated; None where nothing did."""
    if traffic is None or not traffic.sites:
        return None
    total = traffic.total()
    return {
        "values": total.values, "bytes": total.nbytes, "bits_per_value": total.bits_per_value, "saturated": total.saturated,
        "sites": len(traffic.sites), "saturated_at": {site: counts.saturated for site, counts in traffic.sites.items() if counts.saturated},
        "packing": traffic.packing, "bytes_down": traffic.bytes_down, "bytes_up": traffic.bytes_up,
    }


def _as_dict(place: int, result: Generation) -> dict[str, Any]:
    prefill = result.prompt_tokens / result.first_token_s if result.token_ids else 0.0
    return asdict(result) | {"index": place, "prefill_tokens_per_s": prefill}
