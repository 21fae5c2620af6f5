"""What was asked of make bench-edge and whether it holds, a verdict for every row that was measured.

Nothing is judged in a group where one row could hide another, and nothing is assumed of a record that does not say it.
"""

from __future__ import annotations

from collections.abc import Iterator

from hetero_attn.quantity import shown_bytes

HIDDEN = 1.15                   # a token may take so many times the slower of disk and computation
PLANNED = 1.3                   # a planned time is within this factor of the clock
LESS = 3                        # times lower than Accelerate's: token time, and memory
OVER_BUDGET, OVER_PREDICTION = 1.05, 1.1
SEVENTY_PEAK = 1 << 30          # bytes a rank of the 70B shape
UNKNOWN = "not recorded"

Verdict = tuple[str, bool]


def limit_s(rank: dict) -> float:
    """The slower of a rank's disk alone and its computation with communication."""
    return max(rank["disk_s"], rank["compute_s"] + rank["reduce_s"])


def within(one: float, other: float, factor: float) -> bool:
    return max(one, other) <= factor * min(one, other)


def steps(results: dict, part: str) -> dict:
    """A part's steps, without what is said of the machine."""
    return {name: step for name, step in results.get(part, {}).items() if name != "machine"}


def verdicts(results: dict) -> list[Verdict]:
    """(what was asked for and what came out, whether it holds)."""
    return [*_main(results), *_bits(results), *_windows(results), *_accelerate(results), *_seventy(results), *_links(results)]


def _main(results: dict) -> Iterator[Verdict]:
    for step in steps(results, "main").values():
        yield from _group(f"{step['model']}, {len(step['ranks'])} ranks", step["ranks"])


def _group(who: str, ranks: list[dict]) -> Iterator[Verdict]:
    """Ranks that ran together: each one's memory, and the token of all."""
    for number, rank in enumerate(ranks):
        yield _memory(f"{who}, rank {number}", rank)
    yield from _times(who, ranks[0]["token_s"], max(map(limit_s, ranks)), max(rank["plan_token_s"] for rank in ranks))


def _memory(who: str, rank: dict) -> Verdict:
    return (f"{who}: peak {shown_bytes(rank['peak'])}, {rank['peak'] / rank['budget']:.3f} of its budget (at most {OVER_BUDGET}), "
            f"{rank['peak'] / rank['predicted']:.3f} of the prediction (at most {OVER_PREDICTION})",
            rank["peak"] <= OVER_BUDGET * rank["budget"] and rank["peak"] <= OVER_PREDICTION * rank["predicted"])


def _times(who: str, token: float, limit: float, planned: float) -> Iterator[Verdict]:
    yield f"{who}: token {token:.2f} s, {token / limit:.2f} of its limit {limit:.2f} s (at most {HIDDEN})", token <= HIDDEN * limit
    yield (f"{who}: planned token {planned:.2f} s, {planned / token:.2f} of the clock's (within a factor of {PLANNED})",
           within(planned, token, PLANNED))


def _bits(results: dict) -> Iterator[Verdict]:
    for step in steps(results, "bits").values():
        yield (f"logits of {step['tokens']} tokens equal to the held model's: {step['equal']} (how much of each row: "
               f"{step.get('compared', UNKNOWN)})", step["equal"])


def _windows(results: dict) -> Iterator[Verdict]:
    for blocks, row in windows_of(results).items():
        who = f"a window of {blocks} {'block' if blocks == 1 else 'blocks'}"
        yield from _times(who, row["token"], row["token_limit"], row["plan_token_s"])
        yield (f"{who}: prompt of 64 {row['prompt']:.2f} s, {row['prompt'] / row['prompt_limit']:.2f} of its limit "
               f"{row['prompt_limit']:.2f} s (at most {HIDDEN})", row["prompt"] <= HIDDEN * row["prompt_limit"])


def windows_of(results: dict) -> dict[int, dict]:
    """Blocks -> rank 0's times, the slowest rank's disk, the limits, the largest peak."""
    found = steps(results, "ablation")
    if not {"held", "windows"} <= found.keys():
        return {}
    rows = {}
    for blocks in sorted(map(int, found["windows"][0])):
        ranks = [rank[str(blocks)] for rank in found["windows"]]
        disk, peak = max(rank["disk"] for rank in ranks), max(ranks, key=lambda rank: rank["peak"])
        rows[blocks] = ranks[0] | {
            "disk": disk, "peak": peak["peak"], "planned_peak": peak["base"] + peak["ring"],
            "plan_token_s": max(rank["plan_token_s"] for rank in ranks),
            "token_limit": max(disk, *(rank["rest_s"] for rank in ranks)), "prompt_limit": max(disk, found["held"]["prompt_s"])}
    return rows


def _accelerate(results: dict) -> Iterator[Verdict]:
    rows = steps(results, "accelerate")
    for name in ("limited", "as it is"):
        ours, theirs = rows.get(f"{name}, ours"), rows.get(f"{name}, Accelerate")
        if ours is not None:
            yield from _group(f"{len(ours['ranks'])} ranks, the disk {name}", ours["ranks"])
        for step, more in rows.items():
            if step.startswith(f"{name}, ours, "):
                yield from _group(f"{len(more['ranks'])} ranks with {step.removeprefix(f'{name}, ours, ')}, the disk {name}", more["ranks"])
        if ours is None or theirs is None:
            continue
        if name == "limited":                        # as it is, one disk serves all: that ratio's limit is 1, and nothing is asked
            ratio = theirs["token_s"] / ours["ranks"][0]["token_s"]
            yield (f"each process {ours['mbytes_s']:g} MB/s of disk: token time {ratio:.2f}x lower than Accelerate's (at least {LESS})",
                   ratio >= LESS)
        peak, own, torch = theirs["peak"], max(rank["peak"] for rank in ours["ranks"]), theirs.get("torch_bytes")
        alone = UNKNOWN if torch is None else f"{shown_bytes(torch)} of each, beyond it {(peak - torch) / (own - torch):.2f}x"
        yield (f"the disk {name}: peak memory {peak / own:.2f}x lower than Accelerate's (at least {LESS}): {shown_bytes(own)} a rank "
               f"against {shown_bytes(peak)}; torch alone: {alone}", peak >= LESS * own)


def _seventy(results: dict) -> Iterator[Verdict]:
    for name, rank in steps(results, "seventy").items():
        who = f"70B shape, {name} of 8"
        yield f"{who}: peak {shown_bytes(rank['peak'])} (at most {shown_bytes(SEVENTY_PEAK)})", rank["peak"] <= SEVENTY_PEAK
        yield _memory(who, rank)
        yield from _times(who, rank["token_s"], limit_s(rank), rank["plan_token_s"])


def _links(results: dict) -> Iterator[Verdict]:
    for name, row in steps(results, "links").items():
        for way in row["sums_s"]:
            token, planned = row["token_s"][way], link_prediction(row, way)[1]
            yield (f"{name} behind links, {way}: token {token * 1e3:.0f} ms, planned from what tune measured {planned * 1e3:.0f}, "
                   f"{planned / token:.2f} of the clock's (within a factor of {PLANNED})", within(planned, token, PLANNED))


def link_prediction(row: dict, way: str) -> list[float]:
    """Seconds of a token [typed, tuned]: the planner's sums, and products as they were measured with sums left out."""
    return [seconds + row["token_s"]["products alone"] for seconds in row["sums_s"][way]]
