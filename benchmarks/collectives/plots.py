"""The report's pictures: times on one host against size, predictions against the clock, and a prefill's sum by codec."""

from __future__ import annotations

from pathlib import Path

from collectives import bars

COLOURS = {"ours": "#d1495b", "ours, in place": "#edae49", "gloo": "#2e4057", "OpenMPI": "#66a182", "none": "#8d96a3",
           "int4_outliers": "#d1495b", "int4_group32": "#edae49", "int8_group32": "#66a182"}


def draw(stem: Path, title: str, results: dict) -> dict[str, str]:
    """Writes stem_<part>.png of each measured part that has a picture; part -> file name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = {}
    for part, picture in (("one_host", _one_host), ("emulated", _emulated), ("payload", _payload)):
        if part in results:
            figure = picture(results[part])
            figure.suptitle(title, fontsize=9)
            file = stem.with_name(f"{stem.name}_{part}.png")
            figure.savefig(file, dpi=110, bbox_inches="tight")
            pyplot.close(figure)
            files[part] = file.name
    return files


def _one_host(found):
    """A panel a number of ranks: time against size, both logarithmic; the bar of 8 KiB as a line."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found.plain), figsize=(10, 3.8), layout="constrained", squeeze=False)
    for panel, (ranks, sizes) in zip(panels[0], found.plain.items()):
        for name in ("ours", "ours, in place", "gloo"):
            panel.plot(list(sizes), [times[name] * 1e6 for times in sizes.values()], "o-", label=name, color=COLOURS[name])
        if here := found.openmpi.get(ranks):
            panel.plot(list(here), [seconds * 1e6 for seconds in here.values()], "s--", label="OpenMPI", color=COLOURS["OpenMPI"])
        panel.plot(bars.SIZES[0], bars.SMALL_S[ranks] * 1e6, "k_", markersize=20, label="required")
        panel.set(title=f"{ranks} ranks", xscale="log", yscale="log", xlabel="bytes of fp32", ylabel="us")
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(sizes), [bars.size(nbytes) for nbytes in sizes])
        panel.grid(True, which="major", linewidth=0.3)
        panel.legend(fontsize=7)
    return figure


def _emulated(found):
    """Predicted against measured, a colour a configuration, with the 30 % either way."""
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6, 5), layout="constrained")
    where: dict[str, list] = {}
    for point in found.points:
        where.setdefault(f"{point.ranks} ranks, {point.delay_ms:g} ms", []).append(point)
    for name, points in where.items():
        panel.plot([each.measured * 1e3 for each in points], [each.predicted * 1e3 for each in points], "o", markersize=4, label=name)
    ends = [1e3 * pick(each.measured for each in found.points) for pick in (min, max)]
    for factor, style in ((1.0, "k-"), (1 - bars.NEAR, "k:"), (1 + bars.NEAR, "k:")):
        panel.plot(ends, [factor * end for end in ends], style, linewidth=0.7)
    panel.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms (dotted: 30 % off)")
    panel.legend(fontsize=7)
    return figure


def _payload(found):
    """A panel a number of ranks: a bar a way, in the codec's colour."""
    from matplotlib import pyplot

    worlds = sorted({each.ranks for each in found.ways})
    figure, panels = pyplot.subplots(1, len(worlds), figsize=(10, 4), layout="constrained", squeeze=False)
    for panel, ranks in zip(panels[0], worlds):
        ways = [each for each in found.ways if each.ranks == ranks]
        places = range(len(ways))
        panel.barh(places, [each.seconds * 1e3 for each in ways], color=[COLOURS[each.codec] for each in ways])
        panel.set_yticks(places, [f"{each.algorithm} {'bf16' if each.codec == 'none' else each.codec}" for each in ways], fontsize=7)
        panel.invert_yaxis()
        panel.set(title=f"{ranks} ranks", xlabel="ms")
    return figure
