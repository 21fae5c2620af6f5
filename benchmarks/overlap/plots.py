"""The report's pictures: what is hidden beside what could be, and one step as it ran."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from overlap.report import Cell, spent

COLOURS = {"inner": "#2e4057", "product": "#66a182", "sum": "#d1495b", "embed": "#edae49"}
WIDTH = 0.38


def draw(stem: Path, title: str, cells: Sequence[Cell], raw: Sequence[dict[str, Any]]) -> list[str]:
    """Writes stem_hidden.png and, where a cell has a trace, stem_trace.png; their names."""
    import matplotlib

    matplotlib.use("Agg")
    pictures = {"hidden": _hidden([cell for cell in cells if len(cell.counts) == 1 and cell.share > 0.1])}
    traced = [each for each in raw if each.get("trace")]
    if traced:
        busiest = max(traced, key=lambda each: spent(each["trace"])["sums"])
        pictures["trace"] = trace(busiest["trace"], f"{busiest['link']}, {sum(busiest['counts'])} tokens, {busiest['label']}, "
                                                    f"cut {busiest['cuts'].get('auto')}")
    names = []
    for name, figure in pictures.items():
        figure.suptitle(title, fontsize=8)
        file = stem.with_name(f"{stem.name}_{name}.png")
        figure.savefig(file, dpi=110, bbox_inches="tight")
        names.append(file.name)
    return names


def _hidden(cells: Sequence[Cell]):
    """Bars of what the best weave and auto hide, a mark at what the simulation says."""
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(max(6, 1.1 * len(cells)), 4), layout="constrained")
    bars = (("best weave", "#2e4057", lambda cell: cell.best_weave), ("auto", "#66a182", lambda _: "auto"))
    for place, (label, colour, of) in enumerate(bars):
        shown = [(x + (place - 0.5) * WIDTH, cell.hidden(of(cell))) for x, cell in enumerate(cells) if of(cell) in cell.seconds]
        panel.bar([x for x, _ in shown], [hidden for _, hidden in shown], WIDTH, label=label, color=colour)
    panel.plot(range(len(cells)), [cell.reachable(cell.best_weave) for cell in cells], "_", markersize=26, markeredgewidth=2,
               color="#d1495b", label="best weave, simulated", linestyle="none")
    panel.axhline(1, color="black", linewidth=0.6)
    panel.set(ylabel="communication hidden", ylim=(min(0, panel.get_ylim()[0]), 1.15), xticks=range(len(cells)))
    panel.set_xticklabels([f"{cell.link}\n{cell.name} tokens\n{cell.shape}\nshare {cell.share:.0%}" for cell in cells], fontsize=7)
    panel.legend(fontsize=8, ncols=3, loc="upper center")
    return figure


def trace(ranks: Sequence[Sequence[Sequence[Any]]], title: str, seconds: float | None = None):
    """Both lanes of every rank over the first `seconds` of a step (None: all); colours are kinds of task, shades parts."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, panel = pyplot.subplots(figsize=(13, 0.8 + 0.75 * len(ranks) * 2), layout="constrained")
    end = max(event[3] for events in ranks for event in events)
    shown = min(seconds or end, end)
    labels = []
    for rank, events in enumerate(ranks):
        for lane in ("compute", "communication"):
            y = -len(labels)
            labels.append(f"rank {rank}\n{lane}")
            for own_lane, name, begin, finish, _, part in events:
                if own_lane == lane and begin < shown:
                    kind = name.split()[0]
                    panel.broken_barh([(begin, finish - begin)], (y - 0.4, 0.8), facecolor=COLOURS[kind], alpha=1 - 0.22 * (part % 4),
                                      edgecolor="white", linewidth=0.4)
    panel.set(yticks=[-y for y in range(len(labels))], yticklabels=labels, xlabel="seconds", xlim=(0, shown))
    panel.set_title(title, fontsize=8)
    panel.legend(handles=[Patch(color=colour, label=kind) for kind, colour in COLOURS.items()], fontsize=7, ncols=4, loc="upper right")
    return figure
