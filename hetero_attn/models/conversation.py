"""A conversation that keeps its KV cache: each turn prefills only what the last one did not already run.

The new prompt is the template's rendering of all messages. Where it begins with the text so far, the tokens so far stay as they are
(encoding an answer again could cut it differently) and only the rest is encoded; where it does not (templates that rewrite earlier
turns, answers cut by a stop string) the whole is encoded, and the cache is used if it still fits in front.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator

from hetero_attn.models.batch import Sequence
from hetero_attn.models.config import ModelError
from hetero_attn.models.control import Driver
from hetero_attn.models.generate import Piece, check_ids, new_token_limit, run
from hetero_attn.models.sampling import SamplingParams
from hetero_attn.models.tokenizer import Tokenizer

FIRST_CACHE_TOKENS = 4096       # grown by doubling, so that a short talk with a long-context model stays small


class Conversation:
    """Turns of user and assistant on an open driver (rank 0), whose cache it takes over: one conversation at a time.

    messages: what has been said, as the chat template takes it. prefilled: prompt tokens that the last turn had to run.
    """

    def __init__(self, driver: Driver, tokenizer: Tokenizer, params: SamplingParams, *, system: str | None = None):
        """Raises ModelError when the model has no chat template."""
        self._driver, self._tokenizer, self._config = driver, tokenizer, driver.model.config
        seed = params.seed if params.seed is not None else secrets.randbits(63)
        self._params = dataclasses.replace(params, seed=seed)
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._capacity = 0
        self._cache_id: int | None = None
        self.messages: list[dict[str, str]] = []
        self.prefilled = 0
        self._turns = 0
        self.reset()
        tokenizer.chat([*self._opening, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Forgets what was said, the system message apart."""
        self.messages = list(self._opening)
        self._text, self._ids, self._in_cache = "", [], 0           # what the model has read and written; how much of it is cached
        if self._cache_id is not None:
            self._driver.free(self._cache_id)
            self._cache_id = None

    def say(self, text: str) -> Iterator[Piece]:
        """The pieces of the assistant's answer; the last carries the Generation. The turn counts once the iterator is exhausted.

        Raises ModelError when the conversation has outgrown the model's context; nothing has changed then.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._tokenizer.chat(asked)
        ids = self._encoded(prompt)
        check_ids(ids, self._config, "the conversation (/reset starts anew)")
        params = dataclasses.replace(self._params, seed=self._params.seed + self._turns & 2**63 - 1)
        sequence = Sequence(0, ids, params, limit=new_token_limit(ids, params, self._config), keep=True)
        self._place(sequence)
        self.prefilled = len(ids) - sequence.cached
        try:
            for piece in run(self._driver, [sequence], self._tokenizer, max_batch=1):
                yield piece
                if piece.done is not None:
                    self._text = prompt + piece.done.text
                    self._ids = ids + sequence.output
                    if piece.done.finish_reason == "eos":           # the template writes its own end of turn
                        self._ids = self._ids[:-1]
                    if piece.done.finish_reason == "stop":          # the tokens say more than the text: no prefix of what follows
                        self._text = ""
                    self._in_cache = sequence.cached
                    self.messages = [*asked, {"role": "assistant", "content": piece.done.text}]
                    self._turns += 1
        finally:
            if sequence.cached != self._in_cache:                   # broken off: the cache holds a turn that does not count
                self._in_cache = 0

    def _encoded(self, prompt: str) -> list[int]:
        if self._text and prompt.startswith(self._text):
            return self._ids + self._tokenizer.encode(prompt[len(self._text):], add_special_tokens=False)
        return self._tokenizer.encode(prompt, add_special_tokens=False)

    def _place(self, sequence: Sequence) -> None:
        """Gives the turn the cache it continues, if its tokens begin with what is there, else an empty one."""
        fits = sequence.final_length <= self._capacity
        kept = self._in_cache if fits and 0 < self._in_cache < len(sequence.prompt) else 0
        if kept and sequence.prompt[:kept] == self._ids[:kept]:
            sequence.cache_id, sequence.cached = self._cache_id, kept
            return
        if not fits:
            most, memory = self._config.context_length, self._driver.model.memory
            if memory is not None and memory.budget is not None:
                most = min(most, memory.tokens)
            if sequence.final_length > most:         # the context was checked before
                raise ModelError(f"the conversation needs {sequence.final_length} tokens of cache, the memory budget leaves room for "
                                 f"{most}; begin anew, ask for fewer new tokens, or raise --memory-budget")
            placing = getattr(self._driver.model, "placing", None)
            held = placing.tokens(1)[0] if placing is not None and placing.ranks else None
            if held is not None:
                most = min(most, held)
                if sequence.final_length > most:
                    raise placing.refusal(self._driver.model, f"the conversation needs {sequence.final_length} tokens of KV cache, memory "
                                                              f"holds {most}", sequence.final_length)
            self._capacity = min(max(FIRST_CACHE_TOKENS, 2 * sequence.final_length), most)
            self._driver.new_cache(self._capacity, 1)
        elif self._cache_id is not None:
            self._driver.free(self._cache_id)
        self._cache_id = sequence.cache_id = self._driver.add_sequence()
        self._in_cache = 0
