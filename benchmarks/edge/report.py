"""The report of make bench-edge: what was measured beside its limit, and whether what was asked for holds."""

from __future__ import annotations

from pathlib import Path

from hetero_attn.quantity import shown_bytes

HIDDEN = 1.15                   # a token may take so many times the slower of disk and computation


def limit_s(rank: dict) -> float:
    """The slower of a rank's disk alone and its computation with communication."""
    return max(rank["disk_s"], rank["compute_s"] + rank["reduce_s"])


def verdicts(results: dict) -> list[tuple[str, bool]]:
    """(what was asked for and what came out, whether it holds)."""
    found = []
    if "main" in results:
        ranks = results["main"]["ranks"]
        for number, rank in enumerate(ranks):
            found.append((f"rank {number}: peak {shown_bytes(rank['peak'])}, {rank['peak'] / rank['budget']:.3f} of its budget "
                          "(at most 1.05), "
                          f"{rank['peak'] / rank['predicted']:.3f} of the prediction (at most 1.1)",
                          rank["peak"] <= 1.05 * rank["budget"] and rank["peak"] <= 1.1 * rank["predicted"]))
        slowest = max(map(limit_s, ranks))
        ratio = ranks[0]["token_s"] / slowest
        found.append((f"token {ranks[0]['token_s']:.2f} s, {ratio:.2f} of its limit {slowest:.2f} s (at most {HIDDEN})", ratio <= HIDDEN))
    if "bits" in results:
        found.append((f"logits of {results['bits']['tokens']} tokens equal to the held model's: {results['bits']['equal']}",
                      results["bits"]["equal"]))
    if "accelerate" in results and "token_s" in results["accelerate"]["throttled"]["accelerate"]:
        pair = results["accelerate"]["throttled"]
        ratio = pair["accelerate"]["token_s"] / pair["ours"][0]["token_s"]
        found.append((f"throttled: token time {ratio:.1f}x lower than Accelerate's (at least 3)", ratio >= 3))
        peak = pair["accelerate"]["peak"] / max(rank["peak"] for rank in pair["ours"])
        found.append((f"peak memory {peak:.1f}x lower than Accelerate's (at least 3)", peak >= 3))
    if "seventy" in results:
        for number, rank in results["seventy"]["ranks"].items():
            found.append((f"70B shape, rank {number} of 8: peak {shown_bytes(rank['peak'])} (at most 1 GiB), predicted "
                          f"{shown_bytes(rank['predicted'])}", rank["peak"] <= 1 << 30))
    return found


def markdown(results: dict, plot: str | None) -> str:
    """The whole report."""
    machine = next((part["machine"] for part in results.values() if "machine" in part), {})
    lines = ["# Models larger than memory", "", f"`make bench-edge`; {machine.get('cores')} cores {machine.get('cpu')}, torch "
             f"{machine.get('torch')}, {machine.get('date')}. Random bf16 weights, each rank with its own folder (`hetero-attn shard`), "
             "one thread a rank. The limit is the slower of the disk alone (the same reads, nobody multiplying, all ranks at once) and "
             "computation with communication.", ""]
    lines += [f"- {'pass' if passed else 'FAIL'}: {text}" for text, passed in verdicts(results)] + [""]
    if plot and "ablation" in results:
        lines += [f"![token time by window, and memory]({plot})", ""]
    if "main" in results:
        lines += [f"## {results['main']['model']}, {len(results['main']['ranks'])} ranks", "", *_table(results["main"]["ranks"]), ""]
    if "ablation" in results:
        lines += ["## Windows (1B shape, 2 ranks, nothing resident)", "",
                  "| blocks | ring | token s | disk alone s | planned s | of the limit | peak |", "|---:|---:|---:|---:|---:|---:|---:|"]
        for blocks, ranks in results["ablation"]["windows"].items():
            slow = max(ranks, key=limit_s)
            lines.append(f"| {blocks} | {shown_bytes(slow['ring'])} | {ranks[0]['token_s']:.3f} | {slow['disk_s']:.3f} "
                         f"| {max(rank['plan_token_s'] for rank in ranks):.3f} | {ranks[0]['token_s'] / limit_s(slow):.2f} "
                         f"| {shown_bytes(max(rank['peak'] for rank in ranks))} |")
        lines.append("")
    if "accelerate" in results:
        lines += ["## Beside Accelerate's disk offload (1B shape, one process, smallest max_memory that works)", "",
                  f"Throttled: a control group for every process, {results['accelerate']['throttle_mb_s']:g} MB/s of reads each. "
                  "Our reads are direct; Accelerate's go through the page cache, emptied before every token.", "",
                  "| disk | 4 ranks, token s | peak a rank | Accelerate, token s | peak | ratio |", "|---|---:|---:|---:|---:|---:|"]
        for name in ("throttled", "unthrottled"):
            pair = results["accelerate"][name]
            other, ours = pair["accelerate"], pair["ours"]
            if "token_s" in other:
                lines.append(f"| {name} | {ours[0]['token_s']:.2f} | {shown_bytes(max(rank['peak'] for rank in ours))} "
                             f"| {other['token_s']:.2f} | {shown_bytes(other['peak'])} | {other['token_s'] / ours[0]['token_s']:.1f} |")
            else:
                lines.append(f"| {name} | {ours[0]['token_s']:.2f} | | failed: {other['failed']} | | |")
        lines.append("")
    if "seventy" in results:
        ranks = list(results["seventy"]["ranks"].values())
        lines += ["## 70B shape, 8 ranks, two of them one by one", "", "One layer's files stand for all 80 (read directly each time); sums "
                  "between ranks are left out, so a token's time is disk and products alone.", "", *_table(ranks), ""]
    if results.get("links", {}).get("rows"):
        alone = results["links"]["alone_s"]
        lines += ["## Over emulated links, 300 Mbit/s and 1 ms", "", "4 layers of hidden 4096, weights held; predicted: the planner's link "
                  "model (1 ms, 300 Mbit/s, 0.2 ms a message) for the sums, and products as of one rank's token "
                  f"({alone * 1e3:.1f} ms) on two cores.", "",
                  "| ranks | asked for | route of a sum | token ms | predicted ms |", "|---:|---|---|---:|---:|"]
        for name, row in results["links"]["rows"].items():
            count, _, asked = name.partition(" ")
            predicted = row["predicted_sums_s"] * (1 + 1 / row["sums"]) + alone / 2         # two cores do the ranks' products by turns
            lines.append(f"| {count} | {asked} | {' '.join(row['route'])} | {row['token_s'] * 1e3:.1f} | {predicted * 1e3:.1f} |")
        lines.append("")
    return "\n".join(lines)


def _table(ranks: list[dict]) -> list[str]:
    lines = ["| rank | budget | peak | predicted | read a token | first token s | token s | disk alone s | rest s | planned s |",
             "|---:|" + "---:|" * 9]
    for number, rank in enumerate(ranks):
        token = [f"{rank[key]:.2f}" if key in rank else "" for key in ("first_s", "token_s")]
        lines.append(f"| {number} | {shown_bytes(rank['budget'])} | {shown_bytes(rank['peak'])} | {shown_bytes(rank['predicted'])} "
                     f"| {shown_bytes(rank['read_bytes'])} | {token[0]} | {token[1]} | {rank['disk_s']:.2f} "
                     f"| {rank['compute_s'] + rank['reduce_s']:.2f} | {rank['plan_token_s']:.2f} |")
    return lines


def draw(file: Path, results: dict) -> None:
    """Token time and peak memory against the window; nothing where there was no ablation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if "ablation" not in results:
        return
    windows = results["ablation"]["windows"]
    blocks = list(map(int, windows))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(blocks, [ranks[0]["token_s"] for ranks in windows.values()], "o-", color="#d1495b", label="token")
    left.plot(blocks, [max(rank["plan_token_s"] for rank in ranks) for ranks in windows.values()], "s--", color="#66a182", label="planned")
    left.plot(blocks, [max(map(limit_s, ranks)) for ranks in windows.values()], "-", color="#8d96a3", label="limit")
    left.set(xlabel="window, blocks", ylabel="seconds a token", ylim=(0, None), title="1B shape, 2 ranks")
    left.legend(fontsize=8)
    right.plot(blocks, [max(rank["peak"] for rank in ranks) / 2**20 for ranks in windows.values()], "o-", color="#d1495b", label="peak")
    right.plot(blocks, [max(rank["predicted"] for rank in ranks) / 2**20 for ranks in windows.values()], "s--", color="#66a182",
               label="predicted")
    right.set(xlabel="window, blocks", ylabel="MiB a rank", ylim=(0, None), title="memory, Python and torch included")
    right.legend(fontsize=8)
    figure.savefig(file, dpi=110)
