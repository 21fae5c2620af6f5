"""The report's pictures: speed-ups with their limits, products as shares of theirs, cost against size."""

from __future__ import annotations

from pathlib import Path

from cpu.peers import LABELS
from cpu.shapes import DTYPES, SHAPES

COLOURS = {"ours": "#d1495b", "flex": "#66a182", "ort": "#2e4057", "limit": "#8d96a3", "torch": "#8d96a3"}
WIDTH = 0.26


def draw(stem: Path, title: str, results: dict) -> dict[str, str]:
    """Writes stem_<part>.png of each measured part that has a picture; part -> file name."""
    import matplotlib

    matplotlib.use("Agg")
    files = {}
    for part, picture in (("attention", _attention), ("linear", _linear), ("growth", _growth)):
        if results.get(part):
            figure = picture(results[part])
            figure.suptitle(title, fontsize=9)
            file = stem.with_name(f"{stem.name}_{part}.png")
            figure.savefig(file, dpi=110, bbox_inches="tight")
            files[part] = file.name
    return files


def _attention(cells):
    """A panel a dtype: bars of speed-up over torch SDPA, a line at what the limit allows."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for panel, dtype in zip(panels, DTYPES):
        own = {cell.name: cell for cell in cells if cell.dtype == dtype}
        for place, who in enumerate(("ours", "flex", "ort")):
            bars = [(x, own[name].speedup(who)) for x, name in enumerate(SHAPES) if name in own and own[name].speedup(who)]
            places, heights = [x + (place - 1) * WIDTH for x, _ in bars], [value for _, value in bars]
            panel.bar(places, heights, WIDTH, label=LABELS[who], color=COLOURS[who])
        for x, name in enumerate(SHAPES):
            if name in own and "sdpa" in own[name].seconds:
                panel.hlines(own[name].seconds["sdpa"] / own[name].limit_s, x - 0.45, x + 0.45, color=COLOURS["limit"],
                             label="limit" if x == 0 else None)
        panel.axhline(1, color="black", linewidth=0.6)
        panel.set(title=dtype, yscale="log", ylabel="speed-up over torch SDPA", xticks=range(len(SHAPES)), xticklabels=list(SHAPES))
        _plain_numbers(panel)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _linear(products):
    """Share of the limit against the number of rows."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3.2), layout="constrained", sharey=True)
    for panel, dtype in zip(panels, DTYPES):
        own = [product for product in products if product.dtype == dtype]
        rows = [product.rows for product in own]
        panel.plot(rows, [p.flops(p.ours_s) / p.limit for p in own], "o-", color=COLOURS["ours"], label="hetero_attn")
        panel.plot(rows, [p.flops(p.torch_s) / p.limit for p in own], "s--", color=COLOURS["torch"], label="torch F.linear")
        panel.axhline(1, color="black", linewidth=0.6)
        panel.set(title=dtype, xscale="log", xlabel="rows M", xticks=rows, xticklabels=rows, yscale="log")
        panel.xaxis.minorticks_off()
        _plain_numbers(panel)
    panels[0].set_ylabel("share of the limit")
    panels[0].legend(fontsize=7)
    return figure


def _plain_numbers(panel) -> None:
    """0.5 and 20 on a logarithmic axis, not 5 x 10^-1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _growth(curves):
    """Time against size, both logarithmic: decode on the left, prefill on the right."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for curve in curves:
        panel = panels[0 if curve.name.startswith("decode") else 1]
        panel.plot(curve.sizes, [seconds * 1e3 for seconds in curve.seconds], "o-", label=f"{curve.name}: size^{curve.slope:.2f}")
    for panel, axis in zip(panels, ("keys", "queries and keys")):
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms")
        panel.set_xscale("log", base=2)
        panel.grid(True, which="both", linewidth=0.3)
        panel.legend(fontsize=7)
    return figure
