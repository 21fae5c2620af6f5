"""From measured cells to what is asked of them: how much of the communication is hidden, beside what a simulation says could be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from hetero_attn.parallel.schedule_order import COMMUNICATION, COMPUTE
from overlap.cell import NO_COMM

SHARED = "shared memory"                              # the link that is none: nothing is limited
FIXED = ("plain", "weave 2", "weave 3", "weave 4", "tiled")
WEAVES = FIXED[1:4]
ENOUGH_TOKENS = 512
LEAST_SHARE = 0.02                                    # of communication in plain's time: below, what is hidden of it is noise
AUTO_SLACK = 0.03


@dataclass(frozen=True)
class Cell:
    """One link and step. seconds: contender -> one number a round; simulated: what the cost model says of its cut at best; spent: of a
    traced step by auto, as spent() has it."""

    link: str
    shape: str
    counts: tuple[int, ...]
    cuts: Mapping[str, str]
    seconds: Mapping[str, Sequence[float]]
    simulated: Mapping[str, float]
    busy: float = 0.0
    spent: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        decoding = sum(count == 1 for count in self.counts)
        return f"{sum(self.counts)}" if len(self.counts) == 1 else f"{sum(self.counts) - decoding} + {decoding} decoding"

    def rounds(self, contender: str) -> list[float]:
        """Its rounds and those of contenders that had the same cut: they ran the same step."""
        alike = [name for name in self.seconds if name == contender or (
            NO_COMM not in (name, contender) and self.cuts[name] == self.cuts[contender])]
        return [seconds for name in alike for seconds in self.seconds[name]]

    def time(self, contender: str) -> float:
        return median(self.rounds(contender))

    @property
    def share(self) -> float:
        """Communication's part of plain's time."""
        return 1 - self.time(NO_COMM) / self.time("plain")

    def hidden(self, contender: str) -> float:
        """(plain - it) / min(plain - no comm, no comm)."""
        return _hidden(self.time("plain"), self.time(NO_COMM), self.time(contender))

    def reachable(self, contender: str) -> float:
        """The same by the simulation; never more than all, which a cut that computes cheaper than the whole would make it."""
        return min(_hidden(self.simulated["plain"], self.simulated[NO_COMM], self.simulated[contender]), 1.0)

    @property
    def best_weave(self) -> str:
        return min((name for name in WEAVES if name in self.seconds), key=self.time)

    @property
    def best_fixed(self) -> str:
        return min((name for name in FIXED if name in self.seconds), key=self.time)

    @property
    def spread(self) -> float:
        """How far interleaved runs of the best fixed choice lie apart: the middle half's width over the median."""
        runs = sorted(self.rounds(self.best_fixed))
        return (runs[(3 * len(runs)) // 4] - runs[len(runs) // 4]) / median(runs)

    @property
    def required(self) -> float | None:
        """The part that must be hidden: 75 % where communication is 25 to 40 % of plain's time, 60 % up to a half and somewhat beyond."""
        if len(self.counts) > 1 or self.counts[0] < ENOUGH_TOKENS or not 0.25 <= self.share <= 0.55:
            return None
        return 0.75 if self.share <= 0.4 else 0.6


def _hidden(plain: float, no_comm: float, other: float) -> float:
    least = min(plain - no_comm, no_comm)
    return (plain - other) / least if least > 0 else float("nan")


def spent(ranks: Sequence[Sequence[Sequence[Any]]]) -> dict[str, float]:
    """Seconds of a traced step, of the rank that computes longest: computing, waiting between tasks, and the ends, before the first task
    and after the last; and its sums, which go on beside. ranks: of each, Recorder's events."""
    found = []
    for events in ranks:
        lanes = [[event for event in events if event[0] == lane] for lane in (COMPUTE, COMMUNICATION)]
        times = [sum(event[3] - event[2] for event in own) for own in lanes]
        began, ended = min(event[2] for event in lanes[0]), max(event[3] for event in lanes[0])
        first = min([began, *(event[2] for event in lanes[1])])
        found.append({"computing": times[0], "waiting": ended - began - times[0],
                      "ends": began - first + max([0.0, *(event[3] - ended for event in lanes[1])]), "sums": times[1]})
    return max(found, key=lambda each: each["computing"])


@dataclass(frozen=True)
class Line:
    """What is asked, what was found, whether it holds."""

    text: str
    passed: bool


def verdicts(cells: Sequence[Cell], tiled: Sequence[Mapping[str, Any]] = ()) -> list[Line]:
    """Every requirement that these cells can answer."""
    found = []
    for cell in cells:
        if cell.required is not None:
            hidden = cell.hidden(cell.best_weave)
            where = f"{cell.link}, {cell.shape}, {cell.name} tokens, share {cell.share:.0%}"
            found.append(Line(f"{where}: {cell.best_weave} hides {hidden:.0%} (required {cell.required:.0%}, simulated "
                              f"{cell.reachable(cell.best_weave):.0%})", hidden >= cell.required))
    gains = [(cell.time("plain") / cell.time(cell.best_weave), cell) for cell in cells if len(cell.counts) == 1]
    if gains:
        gain, cell = max(gains, key=lambda each: each[0])
        where = f"{cell.link}, {cell.shape}, {cell.name} tokens"
        found.append(Line(f"largest gain over plain: {gain:.2f}x ({where}; required 1.25x)", gain >= 1.25))
    for cell in cells:
        if "auto" in cell.seconds:
            off = cell.time("auto") / cell.time(cell.best_fixed) - 1
            slack = max(AUTO_SLACK, cell.spread)
            found.append(Line(f"{cell.link}, {cell.shape}, {cell.name} tokens: auto [{cell.cuts['auto']}] is {off:+.1%} against "
                              f"{cell.best_fixed} (allowed {slack:.1%})", off <= slack))
    for each in tiled:
        if each["tiles"] == "chosen" and each["link"] != SHARED:               # other numbers of tiles are for comparison
            where = f"{each['link']}: one row-parallel linear of {each['rows']} rows in the tiles of the cost model [{each['cut']}]"
            found.append(Line(f"{where} hides {each['hidden']:.0%} of min(compute, communication)(1 - 1/tiles) (required 70%)",
                              each["hidden"] >= 0.7))
    return found


def markdown(title: str, cells: Sequence[Cell], lines: Sequence[Line], tiled: Sequence[Mapping[str, Any]], pictures: Sequence[str]) -> str:
    """The report."""
    names = [name for name in (NO_COMM, *FIXED, "auto") if any(name in cell.seconds for cell in cells)]
    text = ["# Overlap: schedules of a tensor-parallel decoder", "", title, "",
            "Seconds of one step (median of interleaved rounds, slowest of two ranks). Hidden = (plain - it) / min(plain - no comm, "
            "no comm); in brackets what the simulation of the schedule, with costs measured in the same process, says of both. "
            "Busy: how much of all processors' time sums alone take; so much of them cannot hide where every processor computes, and the "
            "simulation knows it. Contenders that had the same cut ran the same step: their rounds count together.", "",
            "| link | model | tokens | share | busy | " + " | ".join(names) + " |", "|" + "---|" * (5 + len(names))]
    for cell in cells:
        row = []
        for name in names:
            if name not in cell.seconds:
                row.append("-")
            elif name in (NO_COMM, "plain"):
                row.append(f"{cell.time(name):.3f} ({cell.simulated[name]:.3f})")
            else:
                shared = cell.share > LEAST_SHARE
                text_of = f"{cell.time(name):.3f}" + (f", {cell.hidden(name):.0%}" if shared else "")
                if name in cell.simulated:
                    text_of += f" ({cell.simulated[name]:.3f}" + (f", {cell.reachable(name):.0%})" if shared else ")")
                row.append(text_of)
        text.append(f"| {cell.link} | {cell.shape} | {cell.name} | {cell.share:.0%} | {cell.busy:.0%} | " + " | ".join(row) + " |")
    mixed = [cell for cell in cells if len(cell.counts) > 1 and "auto" in cell.seconds]
    if mixed:
        text += ["", "Throughput of mixed batches, tokens a second:", "",
                 "| link | model | tokens | plain | auto | gain |", "|" + "---|" * 6]
        text += [f"| {cell.link} | {cell.shape} | {cell.name} | {sum(cell.counts) / cell.time('plain'):.0f} | "
                 f"{sum(cell.counts) / cell.time('auto'):.0f} | {cell.time('plain') / cell.time('auto'):.2f}x |" for cell in mixed]
    traced = [cell for cell in cells if cell.spent]
    if traced:
        text += ["", "Where a step by auto goes: seconds of one traced step, of the rank that computes longest. What its computing takes "
                 "more than no comm is processor time of the sums beside it, less what parts compute cheaper than the whole.", "",
                 "| link | model | tokens | cut | no comm | computing | waiting in between | both ends | sums beside |", "|" + "---|" * 9]
        text += [f"| {cell.link} | {cell.shape} | {cell.name} | {cell.cuts['auto']} | {cell.time(NO_COMM):.3f} | "
                 + " | ".join(f"{cell.spent[name]:.3f}" for name in ("computing", "waiting", "ends", "sums")) + " |" for cell in traced]
    if tiled:
        text += ["", "One row-parallel linear with its sum, in tiles (seconds). Hidden is of min(compute, communication)(1 - 1/tiles); a "
                 "short tile leaves less than 1/tiles of it uncovered, so more than all of that can be:", "",
                 "| link | rows | product | sum | one after the other | tiles | of | tiled | hidden |", "|" + "---|" * 9]
        for each in tiled:
            whose = "the cost model" if each["tiles"] == "chosen" else "comparison"
            text.append(f"| {each['link']} | {each['rows']} | {each['product_s']:.4f} | {each['sum_s']:.4f} | {each['plain_s']:.4f} | "
                        f"{each['cut']} | {whose} | {each['tiled_s']:.4f} | {each['hidden']:.0%} |")
    text += ["", "What is asked:", "", *(f"- {'yes' if line.passed else 'NO'}: {line.text}" for line in lines)]
    text += ["", *(f"![{name}]({name})" for name in pictures), ""]
    return "\n".join(text)
