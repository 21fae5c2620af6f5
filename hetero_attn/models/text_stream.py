"""Token ids become text piece by piece: never half a character, never part of a stop string, and nothing held back longer than needed.

A token's text depends on its neighbours (bytes of one character spread over tokens, spaces a decoder strips), so each piece is decoded
together with the piece before it. The pieces joined are the text of the whole, whatever the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from hetero_attn.models.tokenizer import Tokenizer


class StreamingDecoder:
    """Text of a continuation, token by token: "".join of all pushes and the flush == tokenizer.decode_continuation(prompt_ids, ids)."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._context = tokenizer.continuation_context(prompt_ids)       # ids whose text is out already
        self._context_chars = len(tokenizer.decode(self._context))
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token settles; "" while a character is incomplete."""
        if token in self._tokenizer.special_ids:
            return ""
        self._pending.append(token)
        text = self._tokenizer.decode(self._context + self._pending)
        if self._tokenizer.ends_inside_character(self._pending, text):
            return ""
        return self._settle(text)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._settle(self._tokenizer.decode(self._context + self._pending)) if self._pending else ""

    def _settle(self, text: str) -> str:
        piece = text[self._context_chars:]
        if piece:
            self._context, self._pending = self._pending, []
            self._context_chars = len(self._tokenizer.decode(self._context))
        return piece


class StopFilter:
    """Passes text through until one of the stop strings is complete; the text ends before it.

    The string that is complete first wins (of several, the one that begins first), as if characters came one at a time: the result
    does not depend on how the text was cut into pieces. Held back is only an end that could still become a stop string.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that can be shown now; "" after a match."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep:]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text held back, when the sequence ends without a match."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop, stop itself left out."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
