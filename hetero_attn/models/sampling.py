"""Which token comes next, given the logits: greedy, or a draw from the filtered distribution.

The filters and their order (repetition penalty, temperature, top-k, top-p, min-p) are those of transformers, because the numbers in a
checkpoint's generation_config.json were chosen with them. Filtering stays on the logits' device; the draw itself is one uniform number
per step from the sequence's own CPU generator, so that what a sequence gets depends on (seed, sequence index, step) and never on the
device or on the batch around it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch

LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny        # less is 0 in fp32; by then all but the best are -inf anyway


class LogitsError(RuntimeError):
    """The model's logits hold NaN or no finite maximum: the numbers, not the request, are at fault."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Checks itself: ValueError (TypeError for a wrong type) names the parameter, the value and the range.

    max_new_tokens      at least 0; a sequence also ends at the model's context
    temperature         0 is greedy; else logits are divided by it
    top_k               keep the k most likely tokens, 0 = all
    top_p               keep the smallest set of tokens whose probability reaches top_p, 1 = all
    min_p               keep tokens at least min_p times as likely as the most likely one, 0 = all
    repetition_penalty  > 1 makes tokens of the prompt and of the output so far less likely, 1 = off
    seed                None draws a fresh one for each call
    stop                strings that end the text; the text ends before them
    ignore_eos          go on after an end-of-sequence token
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        for name in ("max_new_tokens", "top_k"):
            self._check(name, int, lambda value: value >= 0, "a whole number of at least 0")
        self._check("temperature", float, lambda value: value >= 0, "a finite number of at least 0 (0 is greedy)")
        self._check("top_p", float, lambda value: 0 < value <= 1, "above 0 and at most 1 (1 is off)")
        self._check("min_p", float, lambda value: 0 <= value <= 1, "from 0 to 1 (0 is off)")
        self._check("repetition_penalty", float, lambda value: value > 0, "a finite number above 0 (1 is off)")
        if self.seed is not None:
            self._check("seed", int, lambda value: -(2**63) <= value < 2**64, "None or a whole number of 64 bits")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop is {self.stop!r}, expected strings of at least one character")

    def _check(self, name: str, kind: type, holds, expected: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            raise TypeError(f"{name} is {value!r}, expected {expected}")
        if not (math.isfinite(value) and holds(value)):
            raise ValueError(f"{name} is {value}, expected {expected}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @classmethod
    def from_generation_config(cls, config: Mapping, **given) -> SamplingParams:
        """Parameters from a generation_config.json (`config`, {} where there is none); those given (not None) win.

        Without `do_sample` the checkpoint means greedy decoding. A filter that only sampling can use (top_k, top_p, min_p), given
        without a temperature, switches sampling on: an argument should not be dropped in silence.
        """
        given = {name: value for name, value in given.items() if value is not None}
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise TypeError(f"unknown sampling parameter {name!r}; known are {', '.join(known)}")
        found = ("max_new_tokens", "top_k", "top_p", "min_p", "repetition_penalty")
        values = {name: config[name] for name in found if config.get(name) is not None}
        if not isinstance(config.get("do_sample"), bool | None):
            raise TypeError(f"do_sample is {config['do_sample']!r}, expected true or false")
        samples = bool(config.get("do_sample")) or bool(given.keys() & {"top_k", "top_p", "min_p"})
        temperature = config.get("temperature")
        values["temperature"] = (1.0 if temperature is None else temperature) if samples else 0.0
        return cls(**values | given)


def sequence_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of the sequence with this index in its request. Both numbers are hashed together: (0, 1) and (1, 0) differ."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def repetition_penalised(logits: torch.Tensor, history: Sequence[int], penalty: float) -> torch.Tensor:
    """logits [V] with those of the tokens in history divided by penalty if positive, else multiplied by it; each token once."""
    if penalty == 1.0 or not len(history):
        return logits
    seen = torch.tensor(sorted(set(history)), dtype=torch.int64, device=logits.device)
    values = logits[seen]
    return logits.index_put((seen,), torch.where(values > 0, values / penalty, values * penalty))


def filtered(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """logits [V] fp32 after temperature, top-k, top-p and min-p, in this order; what is filtered out is -inf. Not for greedy params."""
    logits = (logits - logits.max()) / max(params.temperature, LEAST_TEMPERATURE)      # from the top, so that nothing overflows
    if 0 < params.top_k < logits.shape[-1]:
        bound = torch.topk(logits, params.top_k).values[-1]                     # ties at the bound all stay
        logits = logits.masked_fill(logits < bound, -math.inf)
    if params.top_p < 1.0:
        ascending, order = torch.sort(logits)
        below = ascending.softmax(-1).cumsum(-1)                                # mass of this token and the less likely ones
        dropped = below <= 1.0 - params.top_p
        dropped[-1] = False
        logits = logits.masked_fill(torch.empty_like(dropped).scatter_(0, order, dropped), -math.inf)
    if params.min_p > 0.0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), -math.inf)
    return logits


def sample(logits: torch.Tensor, params: SamplingParams, history: Sequence[int], generator: torch.Generator | None = None) -> int:
    """The next token of one sequence.

    logits [V] fp32 on any device; history: token ids of prompt and output so far; generator: from sequence_generator, advanced by one
    number (untouched when greedy). Raises LogitsError when the logits hold NaN or no finite maximum.
    """
    logits = repetition_penalised(logits.float(), history, params.repetition_penalty)
    best, token = logits.max(-1)
    if not math.isfinite(best):
        raise LogitsError(f"the logits' maximum is {best.item()}: the model's output is not usable (try another dtype or backend)")
    if params.greedy:
        return int(token)
    if generator is None:
        raise ValueError(f"temperature is {params.temperature}: sampling needs a generator (sequence_generator(seed, index))")
    # In fp64 on the CPU: over 10^5 tokens an fp32 running sum is off by more than the rare tokens' own probability.
    cumulative = filtered(logits, params).cpu().double().softmax(-1).cumsum(-1)
    mark = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
    drawn = torch.searchsorted(cumulative, mark, right=True)                    # the first token whose running sum exceeds the mark
    last = torch.searchsorted(cumulative, cumulative[-1])                       # the last token with any probability
    return int(torch.minimum(drawn, last))
