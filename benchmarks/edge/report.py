"""The report of make bench-edge: what was measured beside its limit, in words, tables and a plot."""

from __future__ import annotations

from pathlib import Path

from edge.verdicts import LESS, limit_s, link_prediction, steps, verdicts, windows_of
from hetero_attn.quantity import shown_bytes


def markdown(results: dict, plot: str | None) -> str:
    """The whole report."""
    machine = next((part["machine"] for part in results.values() if "machine" in part), {})
    dates = sorted({part["machine"]["date"] for part in results.values() if "machine" in part})
    lines = ["# Models larger than memory", "", f"`make bench-edge`; {machine.get('cores')} cores {machine.get('cpu')}, torch "
             f"{machine.get('torch')}, {' and '.join(dates)}. Random bf16 weights, each rank with its own folder (`hetero-attn shard`), "
             "one thread a rank. The limit is the slower of the disk alone (the same reads, nobody multiplying, all ranks at once) and "
             "computation with communication. Peaks are VmHWM: Python and torch are in them.", ""]
    lines += [f"- {'pass' if passed else 'FAIL'}: {text}" for text, passed in verdicts(results)] + [""]
    if plot and windows_of(results):
        lines += [f"![token time by window, and memory]({plot})", ""]
    for step in steps(results, "main").values():
        lines += [f"## {step['model']}, {len(step['ranks'])} ranks", "", *_table(step["ranks"]), ""]
    lines += [*_ablation_table(results), *_accelerate_table(results), *_seventy_table(results), *_links_table(results)]
    return "\n".join(lines)


def _ablation_table(results: dict) -> list[str]:
    rows = windows_of(results)
    if not rows:
        return []
    held = steps(results, "ablation")["held"]
    lines = ["## Windows (1B shape, 2 ranks, nothing resident)", "", "A block is an attention or an MLP slice; the ring holds any so many "
             "in a row. The windows take turns. A token's products are short, so its limit is the disk whatever the window; a prompt of 64 "
             f"tokens takes {held['prompt_s']:.2f} s with all weights held, and shows what a window hides.", "",
             "| blocks | ring | disk alone s | token s | of its limit | planned s | prompt of 64, s | of its limit | peak |",
             "|---:|" + "---:|" * 8]
    for blocks, row in rows.items():
        lines.append(f"| {blocks} | {shown_bytes(row['ring'])} | {row['disk']:.2f} | {row['token']:.2f} "
                     f"| {row['token'] / row['token_limit']:.2f} | {row['plan_token_s']:.2f} | {row['prompt']:.2f} "
                     f"| {row['prompt'] / row['prompt_limit']:.2f} | {shown_bytes(row['peak'])} |")
    return [*lines, ""]


def _accelerate_table(results: dict) -> list[str]:
    rows = steps(results, "accelerate")
    if not rows:
        return []
    first = next(iter(rows.values()))
    more = " (and with a little more, so that reading goes on while ranks wait for one another)" if any(
        ", ours, " in step for step in rows) else ""
    lines = [f"## Beside Accelerate's disk offload ({first['model']})", "",
             f"Four ranks, each within the smallest `--memory-budget` that works{more}, and Accelerate's one process with the smallest "
             "`max_memory` that works: then all of it is on the disk, mapped from the checkpoint's own file. Our reads are direct; the "
             "page cache is made to forget the checkpoint before each of Accelerate's tokens. Where the disk is as it is, one disk serves "
             "all processes, so both can at best take the time of reading the checkpoint once: the limit of that ratio is 1.", ""]
    if any(row["mbytes_s"] for row in rows.values()):
        limited = next(row for row in rows.values() if row["mbytes_s"])
        lines += [f"limited: every process in a control group of its own, which may read {limited['mbytes_s']:g} MB/s "
                  f"({limited['how']}).", ""]
    lines += _slower(rows) + _least_memory(rows)
    lines += ["| disk | who | memory asked for | peak a process | read a token | first token s | token s | disk alone s | GB/s of disk "
              "| ratio |",
              "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for name in ("limited", "as it is"):
        theirs = rows.get(f"{name}, Accelerate")
        for ours in (each for step, each in rows.items() if step.startswith(f"{name}, ours")):
            ranks = ours["ranks"]
            ratio = f"{theirs['token_s'] / ranks[0]['token_s']:.2f}" if theirs else ""
            lines.append(f"| {name} | 4 ranks | {ours['budget']} | {shown_bytes(max(rank['peak'] for rank in ranks))} "
                         f"| 4 x {shown_bytes(max(rank['read_bytes'] for rank in ranks))} | {ranks[0]['first_s']:.2f} "
                         f"| {ranks[0]['token_s']:.2f} | {max(map(limit_s, ranks)):.2f} "
                         f"| {sum(rank['read_bytes'] for rank in ranks) / ranks[0]['token_s'] / 1e9:.2f} | {ratio} |")
        if theirs is not None:
            lines.append(f"| {name} | Accelerate | {theirs['max_memory']} | {shown_bytes(theirs['peak'])}, of which "
                         f"{shown_bytes(theirs['anonymous'])} anonymous | all weights | {theirs['first_s']:.2f} "
                         f"| {theirs['token_s']:.2f} | | {theirs.get('read_bytes', 0) / theirs['token_s'] / 1e9:.2f} | |")
    return [*lines, ""]


def _slower(rows: dict) -> list[str]:
    """What can be said where Accelerate's token was the faster one with a disk that is not limited."""
    ours, theirs = rows.get("as it is, ours"), rows.get("as it is, Accelerate")
    if ours is None or theirs is None or theirs["token_s"] >= ours["ranks"][0]["token_s"]:
        return []
    token, disk = ours["ranks"][0]["token_s"], max(rank["disk_s"] for rank in ours["ranks"])
    rates = [nbytes / seconds / 1e9 for nbytes, seconds in ((sum(rank["read_bytes"] for rank in ours["ranks"]), token),
                                                            (theirs["read_bytes"], theirs["token_s"]))]
    alone = f" (reading as it does, with nobody multiplying, {theirs['disk_s']:.2f} s)" if theirs.get("disk_s") else ""
    return [f"With the disk as it is we were slower: a token took {token / theirs['token_s']:.2f} times Accelerate's, {token:.2f} s, and "
            f"our reads alone {disk:.2f} s, so it is the reading, {rates[0]:.2f} GB/s of four processes together where its one process had "
            f"{rates[1]:.2f}{alone}.", ""]


def _least_memory(rows: dict) -> list[str]:
    """What stands between us and a third of Accelerate's memory, where it stands there."""
    ours, theirs = rows.get("as it is, ours"), rows.get("as it is, Accelerate")
    if ours is None or theirs is None or theirs.get("torch_bytes") is None:
        return []
    own, peak, torch = max(rank["peak"] for rank in ours["ranks"]), theirs["peak"], theirs["torch_bytes"]
    if peak >= LESS * own:
        return []
    return [f"A third of Accelerate's memory would be {shown_bytes(peak / LESS)} a rank. A process that has imported torch and nothing "
            f"else has a peak of {shown_bytes(torch)} here, measured in the same run; {shown_bytes(max(0, peak / LESS - torch))} would be "
            f"left for weights, cache, activations and tokenizer. Beyond torch we hold {shown_bytes(own - torch)} and Accelerate "
            f"{shown_bytes(peak - torch)}, {(peak - torch) / (own - torch):.1f} times as much.", ""]


def _seventy_table(results: dict) -> list[str]:
    ranks = list(steps(results, "seventy").values())
    if not ranks:
        return []
    return ["## 70B shape, 8 ranks, some of them one by one", "", "One layer's files stand for all 80 (read directly each time); sums "
            "between ranks are left out, so a token's time is disk and products alone.", "", *_table(ranks), ""]


def _links_table(results: dict) -> list[str]:
    rows = steps(results, "links")
    if not rows:
        return []
    lines = ["## Over emulated links, 300 Mbit/s and 1 ms (1B shape, weights held)", "",
             "The ways take turns within one run. Predicted: "
             "the planner's sums (as `plan --link 1ms,300Mbit`, and after `tune` has measured the link, where a message also costs what "
             "all ranks' messages take of two cores), and the products that the same ranks take on the same two cores with the sums left "
             "out.", "",
             "| ranks | way | route of a row's sum | token ms | half of them within | of it products | predicted, typed "
             "| predicted, tuned |",
             "|---:|---|---|---:|---:|---:|---:|---:|"]
    for row in rows.values():
        for way in row["sums_s"]:
            typed, tuned = link_prediction(row, way)
            route = " ".join(part for part in row["routes"][way] if part != "none")
            lines.append(f"| {row['ranks']} | {way} | {route} | {row['token_s'][way] * 1e3:.0f} "
                         f"| {' to '.join(f'{each * 1e3:.0f}' for each in row.get('quartiles_s', {}).get(way, ()))} "
                         f"| {row['token_s']['products alone'] * 1e3:.0f} | {typed * 1e3:.0f} | {tuned * 1e3:.0f} |")
    return [*lines, ""]


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
    """Token and prompt time and peak memory against the window; nothing where there was no ablation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = windows_of(results)
    if not rows:
        return
    blocks = list(rows)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, label, color in (("token", "a token", "#d1495b"), ("prompt", "a prompt of 64", "#00798c")):
        left.plot(blocks, [row[name] for row in rows.values()], "o-", color=color, label=label)
        left.plot(blocks, [row[f"{name}_limit"] for row in rows.values()], ":", color=color, label="its limit")
    left.set(xlabel="window, blocks", ylabel="seconds", ylim=(0, None), title="1B shape, 2 ranks")
    left.legend(fontsize=8)
    right.plot(blocks, [row["peak"] / 2**20 for row in rows.values()], "o-", color="#d1495b", label="peak")
    right.plot(blocks, [row["planned_peak"] / 2**20 for row in rows.values()], "s--", color="#66a182", label="before it + the ring")
    right.set(xlabel="window, blocks", ylabel="MiB a rank", ylim=(0, None), title="memory, Python and torch included")
    right.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
