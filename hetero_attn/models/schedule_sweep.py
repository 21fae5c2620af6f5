"""Real steps by several cuts, in turns: which one wins at which length, beside what the cost model expected of it.

From that follow the thresholds: the fewest tokens from which a cut pays at every longer step tried, and the fewest rows from which a
sharded residual is no slower than a whole one; and how much of what the costs promise is there on the clock, from all lengths. Into how
many parts a step is cut stays the costs' choice, length by length. What contradicts itself is said: the machine was busy, or the costs do
not fit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from hetero_attn.models.schedule_ctas import Ctas, sweep_ctas
from hetero_attn.models.schedule_measure import DOUBTFUL, SPREAD, measure_whole_sum, middle_half, time_cuts
from hetero_attn.models.schedule_setup import conditions, places_of
from hetero_attn.parallel.schedule_choice import TILES, WORTH
from hetero_attn.parallel.schedule_cost import Costs
from hetero_attn.parallel.schedule_order import SUM, Cut
from hetero_attn.profile import DeviceProfile
from hetero_attn.profile_overlap import MOST_PARTS

TOKENS = (128, 256, 512, 1024, 2048, 4096)
ROUNDS, LAYERS = 3, 4
MOST_ROUNDS = 12                                     # of a length whose times lie apart
DISTANT = 1.5                                        # so far from its costs a plain step may lie
SHORT_ROWS = (1, 4, 16, 64, 256)
WEAVES = {f"weave {parts}": parts for parts in range(2, MOST_PARTS + 1)}


@dataclass(frozen=True)
class Row:
    """One length: name of a cut -> its seconds on the clock (medians), by the cost model, and by that if all the gain it sees were real.
    spread: the worst cut's, middle_half() of its times."""

    tokens: int
    cuts: dict[str, str]
    measured: dict[str, float]
    expected: dict[str, float]
    promised: dict[str, float]
    spread: float = 0.0

    @property
    def best(self) -> str:
        """The cut that won; plain stands unless another saves WORTH of it."""
        winner = min(self.measured, key=self.measured.__getitem__)
        return winner if self.measured[winner] < (1 - WORTH) * self.measured["plain"] else "plain"


@dataclass(frozen=True)
class Sweep:
    """What was found out. layers: how many the steps ran; whole_sums: rows -> seconds of an all-reduce with whole residual and norm; ctas:
    where sums run on the device's own units; measured_on: as the profile's overlap has it."""

    costs: Costs
    rows: tuple[Row, ...]
    layers: int
    experts: bool
    whole_sums: dict[int, float]
    ctas: Ctas | None = None
    measured_on: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """What makes the result doubtful, in words; [] = nothing."""
        found = [f"steps of {row.tokens} tokens took times that lie {row.spread:.0%} apart" for row in self.rows if row.spread > SPREAD]
        for row in self.rows:
            ratio = row.measured["plain"] / row.expected["plain"]
            if not 1 / DISTANT <= ratio <= DISTANT:
                found.append(f"a plain step of {row.tokens} tokens took {ratio:.2f} of what its pieces did one by one")
        if any(row.best != "plain" and row.tokens < (self.min_tokens or math.inf) for row in self.rows):
            found.append("a cut won at a short length and lost at a longer one")
        if self.min_tokens and self.costs.efficiency < DOUBTFUL / 2:
            found.append(f"a cut won, and of what the costs promised only {self.costs.efficiency:.0%} was there, so auto will hardly cut")
        return found

    @property
    def min_tokens(self) -> int | None:
        """The fewest tokens from which a cut won at every longer length too; None where it never did."""
        won = None
        for row in reversed(self.rows):
            if row.best == "plain":
                break
            won = row.tokens
        return won

    @property
    def parts(self) -> int | None:
        """The number of parts that won most often; None where no weave did."""
        won = Counter(WEAVES[row.best] for row in self.rows if row.best in WEAVES)
        return won.most_common(1)[0][0] if won else None

    @property
    def shard_tokens(self) -> int:
        """The fewest rows, of those tried, from which on the sharded sum is no slower."""
        found = 2 * max(self.whole_sums)
        for rows in sorted(self.whole_sums, reverse=True):
            if self.costs.pieces[SUM](rows) > self.whole_sums[rows]:
                break
            found = rows
        return found

    def settings(self) -> dict[str, Any]:
        """As values of the profile's section `overlap`: all that an earlier sweep may have written, for what is left out stays."""
        threshold = self.min_tokens or (2 * self.rows[-1].tokens if self.rows else TOKENS[0])
        values: dict[str, Any] = {"measured": self.costs.settings(), "measured_on": list(self.measured_on),
                                  "pair_ns": float(f"{self.costs.pair_s * 1e9:.4g}"), "efficiency": round(self.costs.efficiency, 3),
                                  "further_ms": round(self.costs.further_s * 1e3, 3), "shard_tokens": self.shard_tokens, "parts": None,
                                  "min_tokens_moe" if self.experts else "min_tokens": threshold, "attention_ctas": None, "mlp_ctas": None}
        if self.ctas:
            values |= self.ctas.settings()
        return {f"overlap.{name}": value for name, value in values.items()}

    def as_json(self) -> dict[str, Any]:
        rows = [{"tokens": row.tokens, "cuts": row.cuts, "seconds": row.measured, "expected_s": row.expected, "best": row.best,
                 "spread": row.spread} for row in self.rows]
        return {"layers": self.layers, "rows": rows, "min_tokens": self.min_tokens, "parts": self.parts, "shard_tokens": self.shard_tokens,
                "whole_sum_s": self.whole_sums, "costs": self.costs.settings(), "pair_ns": self.costs.pair_s * 1e9,
                "efficiency": self.costs.efficiency, "further_ms": self.costs.further_s * 1e3, "ctas": self.ctas and self.ctas.as_json(),
                "measured_on": list(self.measured_on), "warnings": self.warnings}

    def as_text(self) -> str:
        lines = [f"steps of {self.layers} layers, ms on the clock (expected)"]
        for row in self.rows:
            cells = [f"{name} {row.measured[name] * 1e3:.1f} ({row.expected[name] * 1e3:.1f})" for name in row.cuts]
            lines.append(f"{row.tokens:6} tokens  " + "   ".join(cells) + f"   best: {row.best} [{row.cuts[row.best]}]")
        pays = f"from {self.min_tokens} tokens on" if self.min_tokens else "at no length tried"
        lines.append(f"of what the costs promised {self.costs.efficiency:.0%} was there on the clock; a further sum costs "
                     f"{self.costs.further_s * 1e3:.2f} ms")
        lines += [f"a cut pays {pays}" + (f", best in {self.parts} parts" if self.parts else ""),
                  f"the residual is sharded from {self.shard_tokens} tokens on"]
        if self.ctas:
            lines.append(self.ctas.as_text())
        lines += [f"warning: {text}; measure again while nothing else runs" for text in self.warnings]
        return "\n".join(lines)


def sweep(decoder, profile: DeviceProfile, costs: Costs, budget_s: float, progress: Callable[[str], None] = lambda text: None) -> Sweep:
    """Time plain, weaves and the best tiled at growing lengths until budget_s is used up; all ranks together.

    What is tried follows from the costs and times, which are the same on every rank. The result's costs have the efficiency of all lengths.
    """
    places, layers, rows, left_s = places_of(decoder, profile), min(LAYERS, len(decoder.layers)), [], budget_s
    whole_sums = measure_whole_sum(decoder, SHORT_ROWS)
    whole, tried = replace(costs, efficiency=1.0), {}
    for tokens in TOKENS:
        if tokens > decoder.config.context_length:
            break
        cuts = tried[tokens] = contenders(places, costs, tokens)
        expected = {name: costs.seconds(cut, [tokens], [tokens], layers) for name, cut in cuts.items()}
        promised = {name: whole.seconds(cut, [tokens], [tokens], layers) for name, cut in cuts.items()}
        if left_s < (ROUNDS + 1) * sum(expected.values()):
            break
        progress(f"steps of {tokens} tokens")
        took, spread, began_s = {name: [] for name in cuts}, math.inf, left_s
        while spread > SPREAD and left_s >= began_s / 2 and len(took["plain"]) < MOST_ROUNDS:      # the longer lengths want their share
            for name, own in time_cuts(decoder, cuts, ROUNDS, layers=layers).items():
                took[name] += own
                left_s -= sum(own) * (ROUNDS + 1) / ROUNDS
            spread = max(map(middle_half, took.values()))
        rows.append(Row(tokens, {name: str(cut) for name, cut in cuts.items()}, {name: median(own) for name, own in took.items()},
                        expected, promised, spread))
    costs = replace(costs, efficiency=fitted_efficiency(rows, costs.efficiency))
    rows = [replace(row, expected={name: costs.seconds(cut, [row.tokens], [row.tokens], layers) for name, cut in tried[row.tokens].items()})
            for row in rows]
    ctas = sweep_ctas(decoder, places, rows[-1].tokens, layers, progress) if rows else None
    return Sweep(costs, tuple(rows), layers, bool(decoder.config.experts), whole_sums, ctas, tuple(conditions(decoder, profile.codec)))


def fitted_efficiency(rows: Sequence[Row], otherwise: float) -> float:
    """How much of the gain over plain that the costs promise weaves is there, 0 to 1: least squares over all rows, in parts of each row's
    plain step. `otherwise`, where no weave is promised WORTH of one."""
    pairs = []
    for row in rows:
        for name in row.cuts:
            promised = 1 - row.promised[name] / row.promised["plain"]
            if name.startswith("weave") and promised > WORTH:
                pairs.append((promised, 1 - row.measured[name] / row.measured["plain"]))
    if not pairs:
        return otherwise
    return min(max(sum(promised * real for promised, real in pairs) / sum(promised**2 for promised, _ in pairs), 0.0), 1.0)


def contenders(places, costs: Costs, tokens: int, tiles: Sequence[int] = TILES) -> dict[str, Cut]:
    """plain, a weave of each number of parts, and the tiled cut that the costs like best. Equal cuts come once."""
    cuts = {"plain": Cut.at(tokens)}
    for name, parts in WEAVES.items():
        cuts[name] = places.tapered(places.weave(tokens, parts), [tokens], [tokens], costs)
    cuts["tiled"] = min((places.tiled(tokens, each, costs) for each in tiles),
                        key=lambda cut: costs.seconds(cut, [tokens], [tokens]))
    kept: dict[str, Cut] = {}
    for name, cut in cuts.items():
        if cut not in kept.values():
            kept[name] = cut
    return kept
