"""Text from a model: `generate` returns it whole, `GenerationStream` piece by piece, for batches of unequal prompts.

Everything that can be wrong with a request (a prompt that is too long, above all) is found before the first step. A program may call
these on every rank alike: rank 0 does the work and has the results, the other ranks follow it and get nothing. However it ends, an
exception, Ctrl-C, an iterator that is dropped, the other ranks are released.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

from hetero_attn.models.batch import Batch, Sequence
from hetero_attn.models.config import ModelError, read_json
from hetero_attn.models.control import Driver, serve
from hetero_attn.models.restart import RestartLog
from hetero_attn.models.sampling import SamplingParams
from hetero_attn.models.text_stream import StopFilter, StreamingDecoder
from hetero_attn.models.tokenizer import Tokenizer
from hetero_attn.parallel.placement import shown

MAX_BATCH = 32                  # sequences that run together, unless the caller says otherwise
CACHE_TOKENS = 32768            # tokens the cache holds, unless the caller says otherwise or one sequence alone needs more
PREFILL_CHUNK = 512             # for a model without a profile


@dataclass(frozen=True)
class Generation:
    """What one prompt gave. token_ids include the end-of-sequence token and those of a stop string, text includes neither.

    finish_reason: 'eos', 'stop' (a stop string) or 'length' (max_new_tokens or the model's context).
    first_token_s, total_s: seconds from the request to the first and the last token; tokens_per_s: after the first, 0 if there is none.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    first_token_s: float
    total_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Piece:
    """Text that prompt `index` gained, possibly ""; `done` comes with its last piece."""

    index: int
    text: str
    done: Generation | None = None


def generate(
    model,
    prompts: SequenceOf[str | SequenceOf[int]],
    params: SamplingParams | SequenceOf[SamplingParams] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    stream: Callable[[Piece], None] | None = None,
    max_batch: int = MAX_BATCH,
    cache_tokens: int | None = None,
    driver: Driver | None = None,
    log: RestartLog | None = None,
) -> list[Generation]:
    """Continues every prompt (text or token ids); results in the prompts' order, [] on ranks other than 0.

    params     one for all or one each; None: the checkpoint's generation_config.json
    tokenizer  None: the checkpoint's. Without one only token ids can be given, and texts are empty
    stream     called with each Piece as it comes
    max_batch, cache_tokens  bounds of what runs together; prompts beyond them wait
    driver     a Driver that is open already; None opens one for this call, and the other ranks' call (or serve(model)) ends with it
    log        where each token is written down; what it has of this request already is gone on with

    Raises ModelError (prompt longer than the context, empty prompt without a BOS, unknown token ids) before any work.
    """
    bounds = {"max_batch": max_batch, "cache_tokens": cache_tokens}
    with GenerationStream(model, prompts, params, tokenizer=tokenizer, driver=driver, log=log, **bounds) as pieces:
        results = []
        for piece in pieces:
            if stream is not None:
                stream(piece)
            if piece.done is not None:
                results.append(piece.done)
        return sorted(results, key=lambda result: result.index)


class GenerationStream:
    """The pieces of all prompts as they come: an iterator of Piece, and a context manager. Arguments as for generate.

    The request is checked when it is made. Closing it (also by dropping it) ends the work and releases the other ranks.
    """

    def __init__(
        self, model, prompts, params=None, *, tokenizer=None, max_batch=MAX_BATCH, cache_tokens=None, driver=None, log=None,
    ):
        self._model, self._owned, self._pieces = model, None, iter(())
        if model.communicator.rank != 0:
            self._pieces = _follow(model)
            return
        if driver is None:
            driver = self._owned = Driver(model)
        try:
            if max_batch < 1:
                raise ValueError(f"max_batch is {max_batch}, expected at least 1")
            tokenizer = tokenizer or tokenizer_of(model, needed=any(isinstance(prompt, str) for prompt in prompts))
            sequences = sequences_of(model, prompts, params, tokenizer)
            if log is not None:
                log.restore(sequences)
            running = [sequence for sequence in sequences if sequence.limit]
            memory = getattr(model, "memory", None)
            if cache_tokens is None and memory is not None and memory.budget is not None:
                cache_tokens = memory.tokens                     # what the memory budget left room for
            self.cache_tokens, max_batch = _cache_size(model, running, max_batch, cache_tokens)
            record = None if log is None else log.record
            self._pieces = _run_on_new_cache(driver, sequences, running, tokenizer, max_batch, self.cache_tokens, record)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> GenerationStream:
        return self

    def __next__(self) -> Piece:
        try:
            return next(self._pieces)
        except BaseException:                   # the end, or an error: either way the other ranks are done
            self.close()
            raise

    def close(self) -> None:
        """Ends the work and releases the other ranks. May be called twice."""
        if hasattr(self._pieces, "close"):
            self._pieces.close()
        if self._owned is not None:
            self._owned.close()

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self):
        if getattr(self, "_owned", None) is not None:
            with contextlib.suppress(Exception):        # the group may be gone already; nobody could catch it here
                self.close()


def _run_on_new_cache(driver, sequences, running, tokenizer, max_batch, cache_tokens, record) -> Iterator[Piece]:
    # Not a method: a generator that held its stream would keep it from ending when it is dropped.
    if running:
        driver.new_cache(cache_tokens, min(max_batch, len(running)))
    yield from run(driver, sequences, tokenizer, max_batch=max_batch, record=record)


def _follow(model) -> Iterator[Piece]:
    serve(model)
    yield from ()


def run(
    driver: Driver, sequences: SequenceOf[Sequence], tokenizer: Tokenizer | None, *, max_batch: int,
    record: Callable[[Sequence], None] | None = None,
) -> Iterator[Piece]:
    """Runs sequences to their ends on the driver's cache. An iterator that is dropped leaves unfinished sequences in the cache.

    Output that a sequence has already (after a restart) is told first. record: called with a sequence that got a token.
    """
    model = driver.model
    texts = {sequence.index: _Text(sequence, tokenizer) for sequence in sequences}
    profile = getattr(model, "profile", None)
    chunk = PREFILL_CHUNK if profile is None else profile.prefill_chunk
    for sequence in sequences:
        if not sequence.limit:                                  # nothing was asked for
            yield texts[sequence.index].piece("length")
    eos_ids = eos_of(model, tokenizer)
    ended = set()
    for sequence in sequences:
        for token in sequence.output if sequence.limit else ():
            reason = texts[sequence.index].push(token, eos_ids)
            yield texts[sequence.index].piece(reason)
            if reason is not None:
                ended.add(sequence.index)
    waiting = [sequence for sequence in sequences if sequence.limit and sequence.index not in ended]
    batch = Batch(driver, waiting, max_batch=max_batch, prefill_chunk=chunk)
    while not batch.done:
        pieces = []
        for sequence in batch.step():
            text = texts[sequence.index]
            if record is not None:
                record(sequence)
            reason = text.push(sequence.output[-1], eos_ids)
            if reason is not None:
                batch.finish(sequence)
            pieces.append(text.piece(reason))
        yield from pieces


class _Text:
    """The text of one sequence so far, and its clock."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None):
        self._sequence, self._started, self._first = sequence, time.perf_counter(), None
        self._decoder = None if tokenizer is None else StreamingDecoder(tokenizer, sequence.prompt)
        self._stop = StopFilter(sequence.params.stop)
        self._shown, self._new, self._pushed = [], "", 0

    def push(self, token: int, eos_ids: frozenset[int]) -> str | None:
        """Takes the sequence's newest token; returns the finish reason when it is the last."""
        self._first, self._pushed = self._first or time.perf_counter(), self._pushed + 1
        ended = token in eos_ids and not self._sequence.params.ignore_eos
        if self._decoder is not None and not ended:
            self._new += self._stop.push(self._decoder.push(token))
        full = self._pushed >= self._sequence.limit
        if self._stop.matched is None and not ended and not full:
            return None
        if self._stop.matched is None and self._decoder is not None:
            self._new += self._stop.push(self._decoder.flush())
            self._new += self._stop.flush()
        return "stop" if self._stop.matched is not None else "eos" if ended else "length"

    def piece(self, reason: str | None) -> Piece:
        new, self._new = self._new, ""
        self._shown.append(new)
        return Piece(self._sequence.index, new, None if reason is None else self._generation(reason))

    def _generation(self, reason: str) -> Generation:
        now, output = time.perf_counter(), tuple(self._sequence.output)
        first = (self._first or now) - self._started
        rate = (len(output) - 1) / (now - self._first) if len(output) > 1 else 0.0
        return Generation(
            index=self._sequence.index, text="".join(self._shown), token_ids=output, finish_reason=reason,
            prompt_tokens=len(self._sequence.prompt), first_token_s=first, total_s=now - self._started, tokens_per_s=rate,
        )


def sequences_of(model, prompts, params, tokenizer: Tokenizer | None) -> list[Sequence]:
    """The checked requests. Raises ModelError for prompts that cannot run, naming the prompt and both numbers."""
    config = model.config
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        raise TypeError(f"prompts is {prompts!r}, expected a list of texts or of lists of token ids")
    if params is None:
        params = SamplingParams.from_generation_config(generation_config(config.path))
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ValueError(f"params has {len(each)} entries for {len(prompts)} prompts, expected one for all or one each")
    if tokenizer is None and any(one.stop for one in each):
        raise ModelError(f"{config.path} has no tokenizer.json, so stop strings cannot be found; leave them out")
    fresh = secrets.randbits(63)
    sequences = []
    for index, (prompt, one) in enumerate(zip(prompts, each)):
        name = "the prompt" if len(prompts) == 1 else f"prompt {index + 1} of {len(prompts)}"
        ids = prompt_ids(prompt, config, tokenizer, name)
        one = one if one.seed is not None else dataclasses.replace(one, seed=fresh)
        sequences.append(Sequence(index, ids, one, limit=new_token_limit(ids, one, config)))
    return sequences


def prompt_ids(prompt: str | SequenceOf[int], config, tokenizer: Tokenizer | None, name: str = "the prompt") -> list[int]:
    """A prompt's token ids, checked against the model (its ModelConfig). Raises ModelError."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    if not ids:
        bos = config.bos_id if tokenizer is None or tokenizer.bos_id is None else tokenizer.bos_id
        if bos is None:
            raise ModelError(f"{name} is empty and the model has no beginning-of-text token to start from; give at least one word")
        ids = [bos]
    check_ids(ids, config, name)
    return ids


def check_ids(ids: SequenceOf[int], config, name: str) -> None:
    """Raises ModelError unless ids are tokens of the model and fit its context."""
    if len(ids) > config.context_length:
        raise ModelError(f"{name} has {len(ids)} tokens, longer than the model's context of {config.context_length}; shorten it")
    for token in (min(ids), max(ids)):
        if not 0 <= token < config.vocab_size:
            raise ModelError(f"{name} has token id {token}, the model's vocabulary is 0 to {config.vocab_size - 1}; "
                             "is this the tokenizer of another model?")


def new_token_limit(ids: SequenceOf[int], params: SamplingParams, config) -> int:
    """Most new tokens for a prompt: all but the last of them must find a place in the context."""
    return min(params.max_new_tokens, config.context_length - len(ids) + 1)


def eos_of(model, tokenizer: Tokenizer | None) -> frozenset[int]:
    """End-of-sequence ids: generation_config.json's, else config.json's (model.config has both), else the tokenizer's."""
    if model.config.eos_ids:
        return frozenset(model.config.eos_ids)
    return frozenset() if tokenizer is None or tokenizer.eos_id is None else frozenset({tokenizer.eos_id})


def tokenizer_of(model, *, needed: bool) -> Tokenizer | None:
    """The tokenizer of the model's directory; None if there is no tokenizer.json and it is not needed. Raises ModelError."""
    path = Path(model.config.path)
    return Tokenizer.from_dir(path) if needed or (path / "tokenizer.json").is_file() else None


def generation_config(path: str | Path) -> dict:
    """The content of generation_config.json, {} where there is none. Raises ModelError when it is not a JSON object."""
    return read_json(Path(path) / "generation_config.json", optional=True)


def _cache_size(model, sequences: SequenceOf[Sequence], max_batch: int, asked: int | None) -> tuple[int, int]:
    """(tokens to make the cache for, sequences that run together): what they need together, within bounds, and at least what the longest
    needs alone."""
    needs = sorted((sequence.final_length for sequence in sequences), reverse=True)
    if not needs:
        return 0, max_batch
    if asked is not None and asked < needs[0]:
        raise ModelError(f"a prompt with its new tokens needs a cache of {needs[0]} tokens, cache_tokens is {asked}; "
                         "raise it (a memory budget's is load_model's), or ask for fewer new tokens")
    usual, together, placing = asked or CACHE_TOKENS, min(max_batch, len(needs)), getattr(model, "placing", None)
    if placing is not None and placing.ranks:
        together = placing.sequences(needs[0], together)
        most, on_device = placing.tokens(together or 1)
        if not together:
            raise placing.refusal(model, f"a prompt with its new tokens needs a KV cache of {needs[0]} tokens, memory holds {most} "
                                         f"(placement {shown(placing.asked)})", needs[0])
        # Sequences rather wait for one another than have all of them attended by the host.
        bounds = (usual, most, None if asked else on_device)
        usual = min(each for each in bounds if each is not None)
    return min(sum(needs[:together]), max(needs[0], usual)), together
