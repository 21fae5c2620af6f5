"""Real steps by several cuts, in turns: which one wins at which length, beside what the cost model expected of it.

From that follow the thresholds: the fewest tokens from which a cut pays at every longer step tried, the number of parts that wins there,
and the fewest rows from which a sharded residual is no slower than a whole one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from hetero_attn.models.schedule_ctas import Ctas, sweep_ctas
from hetero_attn.models.schedule_measure import measure_whole_sum, time_cuts
from hetero_attn.models.schedule_setup import places_of
from hetero_attn.parallel.schedule_choice import TILES, WORTH
from hetero_attn.parallel.schedule_cost import Costs
from hetero_attn.parallel.schedule_order import SUM, Cut
from hetero_attn.profile import DeviceProfile
from hetero_attn.profile_overlap import MOST_PARTS

TOKENS = (128, 256, 512, 1024, 2048, 4096)
ROUNDS, LAYERS = 3, 4
SHORT_ROWS = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Row:
    """One length: name of a cut -> its seconds on the clock (medians) and by the cost model."""

    tokens: int
    cuts: dict[str, str]
    measured: dict[str, float]
    expected: dict[str, float]

    @property
    def best(self) -> str:
        """The cut that won; plain stands unless another saves WORTH of it."""
        winner = min(self.measured, key=self.measured.__getitem__)
        return winner if self.measured[winner] < (1 - WORTH) * self.measured["plain"] else "plain"


@dataclass(frozen=True)
class Sweep:
    """What was found out. layers: how many the steps ran; whole_sums: rows -> seconds of an all-reduce with whole residual and norm; ctas:
    where sums run on the device's own units."""

    costs: Costs
    rows: tuple[Row, ...]
    layers: int
    experts: bool
    whole_sums: dict[int, float]
    ctas: Ctas | None = None

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
        won = Counter(int(row.best.removeprefix("weave ")) for row in self.rows if row.best.startswith("weave "))
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
        """As values of the profile's section `overlap`."""
        never = 2 * self.rows[-1].tokens if self.rows else None
        threshold = self.min_tokens or never
        values: dict[str, Any] = {"measured": self.costs.settings(), "pair_ns": float(f"{self.costs.pair_s * 1e9:.4g}"),
                                  "efficiency": round(self.costs.efficiency, 3),
                                  "further_ms": round(self.costs.further_s * 1e3, 3), "shard_tokens": self.shard_tokens}
        if self.parts:
            values["parts"] = self.parts
        if threshold:
            values["min_tokens_moe" if self.experts else "min_tokens"] = threshold
        if self.ctas:
            values |= self.ctas.settings()
        return {f"overlap.{name}": value for name, value in values.items()}

    def as_json(self) -> dict[str, Any]:
        rows = [{"tokens": row.tokens, "cuts": row.cuts, "seconds": row.measured, "expected_s": row.expected, "best": row.best}
                for row in self.rows]
        return {"layers": self.layers, "rows": rows, "min_tokens": self.min_tokens, "parts": self.parts, "shard_tokens": self.shard_tokens,
                "whole_sum_s": self.whole_sums, "costs": self.costs.settings(), "pair_ns": self.costs.pair_s * 1e9,
                "efficiency": self.costs.efficiency, "further_ms": self.costs.further_s * 1e3, "ctas": self.ctas and self.ctas.as_json()}

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
        return "\n".join(lines)


def sweep(decoder, profile: DeviceProfile, costs: Costs, budget_s: float, progress: Callable[[str], None] = lambda text: None) -> Sweep:
    """Time plain, weaves and the best tiled at growing lengths until budget_s is used up; all ranks together.

    What is tried follows from the costs, which are the same on every rank.
    """
    places, layers, rows, left_s = places_of(decoder, profile), min(LAYERS, len(decoder.layers)), [], budget_s
    whole_sums = measure_whole_sum(decoder, SHORT_ROWS)
    for tokens in TOKENS:
        if tokens > decoder.config.context_length:
            break
        cuts = contenders(places, costs, tokens)
        expected = {name: costs.seconds(cut, [tokens], [tokens], layers) for name, cut in cuts.items()}
        left_s -= (ROUNDS + 1) * sum(expected.values())
        if left_s < 0:
            break
        progress(f"steps of {tokens} tokens")
        measured = {name: median(own) for name, own in time_cuts(decoder, cuts, ROUNDS, layers=layers).items()}
        rows.append(Row(tokens, {name: str(cut) for name, cut in cuts.items()}, measured, expected))
    ctas = sweep_ctas(decoder, places, rows[-1].tokens, layers, progress) if rows else None
    return Sweep(costs, tuple(rows), layers, bool(decoder.config.experts), whole_sums, ctas)


def contenders(places, costs: Costs, tokens: int, tiles: Sequence[int] = TILES) -> dict[str, Cut]:
    """plain, a weave of each number of parts, and the tiled cut that the costs like best. Equal cuts come once."""
    cuts = {"plain": Cut.at(tokens)}
    for parts in range(2, MOST_PARTS + 1):
        cuts[f"weave {parts}"] = places.tapered(places.weave(tokens, parts), [tokens], [tokens], costs)
    cuts["tiled"] = min((places.tiled(tokens, each, costs) for each in tiles),
                        key=lambda cut: costs.seconds(cut, [tokens], [tokens]))
    kept: dict[str, Cut] = {}
    for name, cut in cuts.items():
        if cut not in kept.values():
            kept[name] = cut
    return kept
