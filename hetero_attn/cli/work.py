"""One rank's part of `hetero-attn generate`: join the group, load the model, then drive (rank 0) or follow.

Rank 0 alone writes to stdout and reads stdin. The others end when it does, or with an error when it is lost.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import resource_tracker
from typing import Any

import torch

from hetero_attn.cli.chat import converse
from hetero_attn.cli.errors import REFUSED, CommandFailed, report
from hetero_attn.cli.output import TextPrinter, report_json, report_peaks, report_placements, report_speed, report_trace
from hetero_attn.cli.progress import ByteProgress
from hetero_attn.cli.request import Request, as_prompts
from hetero_attn.cli.trust import ask_for_token, need_trust
from hetero_attn.collectives import init_communicator
from hetero_attn.models.budget import peak_bytes
from hetero_attn.models.config import ModelError
from hetero_attn.models.control import Driver, serve
from hetero_attn.models.decoder import Decoder
from hetero_attn.models.generate import Generation, Piece, generate
from hetero_attn.models.load import load_model
from hetero_attn.models.placing import gather_placements
from hetero_attn.models.restart import RestartLog
from hetero_attn.models.tokenizer import Tokenizer
from hetero_attn.parallel.launch import RankFailure, run_ranks
from hetero_attn.parallel.trace import Recorder, gather_events, meet
from hetero_attn.parallel.trace_file import write_trace
from hetero_attn.registry import use_backend

RESTARTS = 3                    # of ranks started here
NOT_AGAIN = ("ModelError", "CommandError", "ProfileError", "DeviceMemoryError", "UnsupportedError", "WindowError",
             "LogitsError")     # what a restart cannot mend


def work(request: Request) -> int:
    """Runs this rank to the end; returns the exit code."""
    if "RANK" in os.environ:
        # Ctrl-C reaches every rank of a terminal, and the launcher sends it on: end at once, nobody waits for an orderly goodbye.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    need_trust(request.trust_network, "generate")
    with init_communicator(request.profile, device=request.device) as communicator, use_backend(request.backend):
        ask_for_token(communicator)
        first = communicator.rank == 0
        if request.profile.threads_per_rank:
            torch.set_num_threads(request.profile.threads_per_rank)
        started = time.perf_counter()
        model = load_model(
            request.model, request.profile, communicator=communicator, dtype=request.dtype, vocabulary=request.vocabulary,
            progress=ByteProgress("loading weights", bar=request.bar) if first else None,
            cache_tokens=request.cache_tokens, cache_sequences=request.cache_sequences,
        )
        tell_plan(model)
        if request.trace is not None:
            model.recorder = Recorder(model.device)
            meet(model.recorder, communicator)
        if not first:
            serve(model)
            gather_peaks(model)
            gather_placements(model)
            if request.trace is not None:
                gather_events(model.recorder, communicator)
            return 0
        load_s, results, log, error = time.perf_counter() - started, [], None, None
        try:
            with Driver(model) as driver:
                results, log = drive(driver, request)
        except (*REFUSED, BrokenPipeError) as refused:
            if driver.broken:
                raise
            error = refused                                    # the other ranks were released: an orderly end for all
        # The last words with the others, however it ended: they ask for them in this order.
        peaks, placements = gather_peaks(model), gather_placements(model)
        events = None if request.trace is None else gather_events(model.recorder, communicator)
    if error is not None:
        return report(error)
    try:
        summarise(request, results, load_s, model, peaks, placements)
        if events is not None:
            write_trace(request.trace, events)
            report_trace(request, model, empty=not any(events))
    except (*REFUSED, OSError) as refused:
        return report(refused)
    finally:
        if log is not None:
            forget(log)
    return 0


def forget(log: RestartLog) -> None:
    """The text is complete, and stays so where its log cannot be removed: a line, not a failure that torchrun would start all ranks for."""
    try:
        log.remove()
    except ModelError as error:
        print(f"hetero-attn: {error}", file=sys.stderr, flush=True)


def drive(driver: Driver, request: Request) -> tuple[list[Generation], RestartLog | None]:
    """Rank 0's part with the model loaded: prints the texts, unless they are to come as JSON, and returns them, and the log that a restart
    would go on from."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")               # a terminal that cannot show a character is no reason to stop
    tokenizer, log = Tokenizer.from_dir(driver.model.config.path), None
    if request.interactive:
        results = converse(driver, tokenizer, request)
    else:
        echo = request.prompts if request.echo else ()
        prompts, params = as_prompts(request, tokenizer), request.params
        if request.restart is not None:
            log = RestartLog(request.restart, prompts, params)
            params = replace(params, seed=log.seed)
            if log.tokens:
                print(f"going on after {log.tokens} tokens", file=sys.stderr, flush=True)
        skip = log.shown if log else 0
        printer = None if request.json else TextPrinter(len(request.prompts), stream=request.stream, echo=echo, skip=skip)

        def show(piece: Piece) -> None:
            printer(piece)
            if log is not None:
                log.note_shown(printer.shown)

        stream = None if printer is None else show
        results = generate(driver.model, prompts, params, tokenizer=tokenizer, stream=stream, driver=driver, log=log)
    return results, log


def summarise(
    request: Request, results: list[Generation], load_s: float, model: Decoder, peaks: list[dict[str, int]],
    placements: list[dict[str, Any]],
) -> None:
    """What rank 0 says at the end, when the others have been released. peaks: the memory that each rank has held; placements: where each
    rank's KV lay."""
    codecs = model.communicator.codecs
    traffic = None if codecs is None else codecs.traffic
    if request.json:
        report_json(request, results, load_s, traffic, peaks, placements)
    report_speed(request, results)
    report_peaks(peaks)
    report_placements(placements)
    if traffic is not None and traffic.sites:
        print(f"codec, on rank 0: {traffic.summary()}", file=sys.stderr, flush=True)


def tell_plan(model: Decoder) -> None:
    """Every rank's memory plan on stderr, in rank order, where weights are streamed."""
    for rank in range(model.communicator.world_size if model.memory is not None else 0):
        if rank == model.communicator.rank:
            print(model.memory.summary(rank), file=sys.stderr, flush=True)
        if model.communicator.world_size > 1:
            model.communicator.barrier(site="memory")


def gather_peaks(model: Decoder) -> list[dict[str, int]]:
    """Budget (0: none), predicted and measured peak of every rank, bytes; [] where no weights are streamed. All ranks call it together."""
    if model.memory is None:
        return []
    own = torch.tensor([[model.memory.budget or 0, model.memory.predicted, peak_bytes()]], device=model.communicator.device)
    if model.communicator.world_size > 1:
        own = model.communicator.all_gather(own, sizes=[1] * model.communicator.world_size, site="memory")
    return [dict(zip(("budget", "predicted", "measured"), row)) for row in own.tolist()]


def in_own_ranks(request: Request) -> int:
    """Starts request.tp ranks of work() on this host and waits for them; returns the exit code. Raises CommandFailed."""
    left = RESTARTS if request.restart is not None else 0
    try:
        while True:
            try:
                with terminal_restored(), interrupts_kept_from_ranks(), command_line_kept_from_ranks():
                    return run_ranks(work, (without_text(request),), request.tp, first_args=(request,),
                                     threads=request.profile.threads_per_rank or None)[0]
            except RankFailure as error:
                if not left or error.reason.endswith("SIGINT") or error.reason.startswith(NOT_AGAIN):
                    raise
                left -= 1
                print(f"hetero-attn: {error}; starting the ranks again", file=sys.stderr, flush=True)
    except RankFailure as error:
        if error.reason.endswith("SIGINT"):                    # it heard of the Ctrl-C before we did
            raise KeyboardInterrupt from None
        failed = CommandFailed(str(error))
        failed.add_note(error.traceback)
        raise failed from None
    finally:
        if request.restart is not None:
            with suppress(OSError):                            # not there, or nowhere to be: that has been told already
                request.restart.unlink()                       # nobody else knows its name


def without_text(request: Request) -> Request:
    """The request as the other ranks get it: nothing that a person wrote. They are told by rank 0 what to do, and not what it is about."""
    return replace(request, prompts=(), system=None, params=replace(request.params, stop=()))


@contextmanager
def command_line_kept_from_ranks() -> Iterator[None]:
    """Spawned processes are handed sys.argv, and --prompt stands in it."""
    before, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def interrupts_kept_from_ranks() -> Iterator[None]:
    """Processes started in this block do not notice Ctrl-C until they ask for it: a rank that is still importing would print a traceback.

    What a process inherits is the mask of the thread that starts it. So this thread blocks the signal, and another one takes it in.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()                          # started later, it would unblock the signal again
    over = threading.Event()
    threading.Thread(target=over.wait, name="hetero-attn-interrupts", daemon=True).start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        over.set()


@contextmanager
def terminal_restored() -> Iterator[None]:
    """The terminal's settings are afterwards what they were: a rank that is ended while a person types cannot see to that."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
