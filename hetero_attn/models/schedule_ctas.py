"""On how many of the device's units a sum should run beside the products: few leave more to the products, many are sooner done.

Asked only where the communicator says that its sums take units (Communicator.cta_choices: kernels of our own, one CTA a unit). TokenWeave
finds the numbers of its attention and MLP phases by a long sweep; here a weave's steps are timed with equal numbers first, and then each is
varied beside the other's best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from hetero_attn.models.schedule_measure import time_cuts
from hetero_attn.parallel.schedule_choice import Places

ROUNDS, PARTS = 3, 2
Pair = tuple[int, int]                               # CTAs of a sum after an attention, and after an MLP


@dataclass(frozen=True)
class Ctas:
    """seconds: pair -> a step of `tokens` tokens in two parts, medians of the slowest rank's."""

    tokens: int
    seconds: Mapping[Pair, float]

    @property
    def best(self) -> Pair:
        """The pair that won; of equals the one that leaves most to the products."""
        return min(self.seconds, key=lambda pair: (self.seconds[pair], sum(pair)))

    def settings(self) -> dict[str, int]:
        """As values of the profile's section `overlap`, without its name."""
        return {"attention_ctas": self.best[0], "mlp_ctas": self.best[1]}

    def as_json(self) -> dict[str, Any]:
        tried = [{"attention_ctas": a, "mlp_ctas": m, "seconds": seconds} for (a, m), seconds in self.seconds.items()]
        return {"tokens": self.tokens, "tried": tried, **self.settings()}

    def as_text(self) -> str:
        cells = [f"{a}/{m} {seconds * 1e3:.1f}" for (a, m), seconds in self.seconds.items()]
        return f"CTAs of sums after attention/MLP, ms of {self.tokens} tokens: {'   '.join(cells)}   best: {self.best[0]}/{self.best[1]}"


def sweep_ctas(decoder, places: Places, tokens: int, layers: int, progress: Callable[[str], None] = lambda text: None) -> Ctas | None:
    """The numbers of CTAs put to the clock, all ranks together; the best are in use afterwards. None where there is no choice."""
    choices = decoder.communicator.cta_choices
    if len(choices) < 2:
        return None
    cut, seconds = places.weave(tokens, PARTS), {}

    def time(pairs: list[Pair]) -> None:
        pairs = [pair for pair in pairs if pair not in seconds]
        took: dict[Pair, list[float]] = {pair: [] for pair in pairs}
        for number in range(ROUNDS):                 # in turns, so that a device that drifts drifts for all of them
            for pair in pairs if number % 2 else reversed(pairs):
                decoder.communicator.use_ctas(*pair)
                took[pair] += time_cuts(decoder, {"weave": cut}, 1, layers=layers)["weave"]
        seconds.update({pair: median(own) for pair, own in took.items()})

    progress(f"CTAs of sums, steps of {tokens} tokens")
    time([(count, count) for count in choices])
    _, mlp = Ctas(tokens, seconds).best
    time([(count, mlp) for count in choices])
    attention, _ = Ctas(tokens, seconds).best
    time([(attention, count) for count in choices])
    found = Ctas(tokens, seconds)
    decoder.communicator.use_ctas(*found.best)
    return found
