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
from contextlib import contextmanager
from multiprocessing import resource_tracker

import torch

from hetero_attn.cli.chat import converse
from hetero_attn.cli.errors import REFUSED, CommandFailed, report
from hetero_attn.cli.output import TextPrinter, report_json, report_speed
from hetero_attn.cli.progress import ByteProgress
from hetero_attn.cli.request import Request, as_prompts
from hetero_attn.collectives import init_communicator
from hetero_attn.models.control import Driver, serve
from hetero_attn.models.generate import generate
from hetero_attn.models.load import load_model
from hetero_attn.models.tokenizer import Tokenizer
from hetero_attn.parallel.launch import RankFailure, run_ranks
from hetero_attn.parallel.trace import Recorder, gather_events, meet, write_trace
from hetero_attn.registry import use_backend


def work(request: Request) -> int:
    """Runs this rank to the end; returns the exit code."""
    if "RANK" in os.environ:
        # Ctrl-C reaches every rank of a terminal, and the launcher sends it on: end at once, nobody waits for an orderly goodbye.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with init_communicator(request.profile, device=request.device) as communicator, use_backend(request.backend):
        first = communicator.rank == 0
        if request.profile.threads_per_rank:
            torch.set_num_threads(request.profile.threads_per_rank)
        started = time.perf_counter()
        model = load_model(
            request.model, request.profile, communicator=communicator, dtype=request.dtype, vocabulary=request.vocabulary,
            progress=ByteProgress("loading weights", bar=request.bar) if first else None,
        )
        if request.trace is not None:
            model.recorder = Recorder(model.device)
            meet(model.recorder, communicator)
        if not first:
            serve(model)
            if request.trace is not None:
                gather_events(model.recorder, communicator)
            return 0
        load_s = time.perf_counter() - started
        try:
            with Driver(model) as driver:
                drive(driver, request, load_s)
        except (*REFUSED, BrokenPipeError) as error:
            if driver.broken:
                raise
            code = report(error)                               # the other ranks were released: an orderly end for all
            if request.trace is not None:
                gather_events(model.recorder, communicator)
            return code
        if request.trace is not None:
            write_trace(request.trace, gather_events(model.recorder, communicator))
            print(f"trace: {request.trace}", file=sys.stderr, flush=True)
    return 0


def drive(driver: Driver, request: Request, load_s: float) -> None:
    """Rank 0's part with the model loaded."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")               # a terminal that cannot show a character is no reason to stop
    tokenizer = Tokenizer.from_dir(request.model)
    if request.interactive:
        results = converse(driver, tokenizer, request)
    else:
        echo = request.prompts if request.echo else ()
        printer = None if request.json else TextPrinter(len(request.prompts), stream=request.stream, echo=echo)
        results = generate(driver.model, as_prompts(request, tokenizer), request.params, tokenizer=tokenizer, stream=printer, driver=driver)
    codecs = driver.model.communicator.codecs
    traffic = None if codecs is None else codecs.traffic
    if request.json:
        report_json(request, results, load_s, traffic)
    report_speed(request, results)
    if traffic is not None and traffic.sites:
        print(f"codec, on rank 0: {traffic.summary()}", file=sys.stderr, flush=True)


def in_own_ranks(request: Request) -> int:
    """Starts request.tp ranks of work() on this host and waits for them; returns the exit code. Raises CommandFailed."""
    try:
        with terminal_restored(), interrupts_kept_from_ranks():
            return run_ranks(work, (request,), request.tp, threads=request.profile.threads_per_rank or None)[0]
    except RankFailure as error:
        if error.reason.endswith("SIGINT"):                    # it heard of the Ctrl-C before we did
            raise KeyboardInterrupt from None
        failed = CommandFailed(str(error))
        failed.add_note(error.traceback)
        raise failed from None


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
