"""--chat without a prompt: a conversation, one line a turn, with the person at the terminal or with a pipe.

/reset forgets what was said, /exit or the end of the input (Ctrl-D) ends. The prompt sign goes to stderr unless both ends are a
terminal, so that a pipe's output holds answers alone.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator

from hetero_attn.cli.errors import CommandError, one_line
from hetero_attn.cli.output import TextPrinter
from hetero_attn.cli.request import Request
from hetero_attn.models.config import ModelError
from hetero_attn.models.control import Driver
from hetero_attn.models.conversation import Conversation
from hetero_attn.models.generate import Generation
from hetero_attn.models.tokenizer import Tokenizer

SIGN = ">>> "


def converse(driver: Driver, tokenizer: Tokenizer, request: Request) -> list[Generation]:
    """Answers every line of standard input; returns the turns.

    Raises ModelError when a piped conversation outgrows the context, CommandError when it is not UTF-8.
    """
    stdin = standard_input()
    conversation = Conversation(driver, tokenizer, request.params, system=request.system)
    turns: list[Generation] = []
    if stdin.isatty():
        print("/reset forgets the conversation, /exit or Ctrl-D ends it", file=sys.stderr, flush=True)
    for line in lines(stdin):
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
        elif line.strip():
            printer = None if request.json else TextPrinter(1, stream=request.stream)
            try:
                for piece in conversation.say(line):
                    if printer is not None:
                        printer(piece)
                    if piece.done is not None:
                        turns.append(piece.done)
            except ModelError as error:
                if not stdin.isatty():
                    raise
                print(f"hetero-attn: error: {one_line(error)}", file=sys.stderr, flush=True)
    return turns


def standard_input():
    """This process's standard input as UTF-8; in a spawned rank, whose sys.stdin is the null device, the terminal's or pipe's own.

    Wrong bytes are replaced where a person types, and an error in a pipe.
    """
    if multiprocessing.parent_process() is not None:
        sys.stdin = open(0, closefd=False)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace" if sys.stdin.isatty() else "strict")
    return sys.stdin


def lines(stdin) -> Iterator[str]:
    """The lines without their ends, after a sign and with line editing where a person types them."""
    if stdin.isatty() and sys.stdout.isatty():
        import readline  # noqa: F401  (input() edits lines once it is imported)

        while True:
            try:
                yield input(SIGN)
            except EOFError:
                print(flush=True)
                return
    while True:
        if stdin.isatty():
            print(SIGN, end="", file=sys.stderr, flush=True)
        try:
            line = stdin.readline()
        except UnicodeDecodeError as error:
            raise CommandError(f"standard input is not UTF-8 text (a byte is {error.object[error.start]:#04x})") from None
        if not line:
            return
        yield line.rstrip("\n")
