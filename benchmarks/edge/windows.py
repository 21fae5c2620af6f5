"""Windows of several sizes in turns: the model is loaded once, and each round gives it every window anew, so that all meet the same disk.

Two things are timed: one token, which hardly multiplies, so that the disk is the limit whatever the window; and a prompt of 64 tokens,
whose products take about as long as the reads, so that it shows how much of one a window hides behind the other.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from pathlib import Path

from edge.ranks import greedy, read_alone
from hetero_attn.models.budget import peak_bytes, resident_bytes, works_of
from hetero_attn.models.control import serve
from hetero_attn.models.load import load_model
from hetero_attn.parallel.residency import pass_seconds, window_bytes
from hetero_attn.parallel.window import WeightWindow

TOKENS = 3                      # after each prompt
PROMPT = [3 + 17 * place % 509 for place in range(64)]


def held(folder: str, rounds: int) -> dict:
    """The same prompt and tokens with all weights held."""
    model = load_model(folder, "edge", cache_tokens=128)
    if model.communicator.rank:
        for _ in range(rounds):
            serve(model)
        return {}
    times = [greedy(model, 1 + TOKENS, PROMPT)[0] for _ in range(rounds)]
    tokens = itertools.chain.from_iterable(each[1:] for each in times)
    return {"prompt_s": statistics.median(each[0] for each in times), "token_s": statistics.median(tokens)}


def by_turns(folder: str, windows: list[int], rounds: int) -> dict[int, dict]:
    """A rank's figures for each number of blocks: seconds (rank 0), the disk alone, what the plan says, and its memory."""
    model = load_model(folder, "edge", cache_tokens=128, window=1)
    # Without checksums, which every window would compare anew in its first pass.
    pieces, plan = [replace(piece, checks=()) for piece in model.window.pieces], model.memory
    works = works_of(model.window, plan.rates)
    found: dict[int, dict] = {blocks: {"prompt": [], "token": [], "disk": [], "peak": 0} for blocks in windows}
    model.window.close()
    for _ in range(rounds):
        for blocks in windows:
            window = WeightWindow(pieces, window_bytes(works, blocks))
            _give(model, window)
            _forget_peak()
            base = resident_bytes()
            window.start()
            row = found[blocks]
            if model.communicator.rank == 0:
                times, _, _ = greedy(model, 1 + TOKENS, PROMPT)
                row["prompt"].append(times[0])
                row["token"] += times[1:]
            else:
                serve(model)
            row["disk"].append(read_alone(model))
            row["peak"] = max(row["peak"], peak_bytes())
            row |= {"ring": window.ring_bytes, "base": base,
                    "plan_token_s": pass_seconds(works, window.ring_bytes, frozenset(), plan.rates.disk_bytes_s)}
            window.close()
    return {blocks: {name: statistics.median(value) if isinstance(value, list) and value else value for name, value in row.items()} | {
        "rest_s": plan.compute_s + plan.reduce_s} for blocks, row in found.items()}


def _give(model, window: WeightWindow) -> None:
    """Every layer takes its weights from this window from now on."""
    for module in model.modules():
        lent = getattr(module, "streamed", None)
        for each in lent if isinstance(lent, list) else [lent] if lent is not None else []:
            each.window = window
    model.window = window


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")    # VmHWM begins anew
