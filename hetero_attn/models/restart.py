"""What rank 0 writes down of a generation, so that it can go on from the last complete token when the ranks have been started again.

A line of JSON for each token (which sequence, which token, where its random numbers stand), and one for how many characters have been
shown. The cache is not kept: it is rebuilt by running prompt and new tokens as one prefill. The file holds the text's token ids; it lies on
rank 0's machine alone, readable by its user alone, and is removed at the end.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch

from hetero_attn.models.batch import Sequence
from hetero_attn.models.config import ModelError


def folder() -> Path:
    """Where the files of runs under torchrun lie (those of ranks started here lie in their launcher's own folder)."""
    root = os.environ.get("HETERO_ATTN_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hetero_attn"
    return Path(root) / "restart"


class RestartLog:
    """The log at `path`; `prompts` and `params` tell whether what lies there is of the same request. seed: the one to go on with.

    Raises ModelError, from whatever writes, where the file cannot be written.
    """

    def __init__(self, path: Path, prompts: SequenceOf, params) -> None:
        self.path, self.shown, self.seed = Path(path), 0, params.seed
        self._tokens: dict[int, list[int]] = {}
        self._states: dict[int, bytes | None] = {}
        request = hashlib.sha256(repr((list(prompts), {**vars(params), "seed": None})).encode()).hexdigest()
        lines, whole = self._read()
        if lines and lines[0].get("request") == request:
            with self._errors_told():
                os.truncate(self.path, whole)                            # what follows half a line could never be read again
            self.seed = lines[0]["seed"]
            for line in lines[1:]:
                if "shown" in line:
                    self.shown = line["shown"]
                    continue
                self._tokens.setdefault(line["sequence"], []).append(line["token"])
                self._states[line["sequence"]] = base64.b64decode(line["random"]) if line["random"] else None
        else:
            with self._errors_told():
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self.path.unlink(missing_ok=True)
            self._write({"request": request, "seed": self.seed})

    @property
    def tokens(self) -> int:
        """New tokens that are there already, of all sequences."""
        return sum(map(len, self._tokens.values()))

    def restore(self, sequences: SequenceOf[Sequence]) -> None:
        """Gives the sequences the tokens they had, and their random numbers' place."""
        for sequence in sequences:
            sequence.output[:] = self._tokens.get(sequence.index, [])
            state = self._states.get(sequence.index)
            if state and sequence.generator is not None:
                sequence.generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))

    def record(self, sequence: Sequence) -> None:
        """A sequence got a token."""
        state = None if sequence.generator is None else bytes(sequence.generator.get_state().numpy())
        self._write({"sequence": sequence.index, "token": sequence.output[-1],
                     "random": base64.b64encode(state).decode() if state else None})

    def note_shown(self, characters: int) -> None:
        """So many characters of all texts have reached the reader."""
        if characters > self.shown:
            self.shown = characters
            self._write({"shown": characters})

    def remove(self) -> None:
        """The text is complete. Raises ModelError where the file, and the text's token ids in it, has to stay."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise ModelError(f"{self.path} cannot be removed: {error.strerror}; delete it, the token ids of the text are in it") from None

    def _write(self, line: dict) -> None:
        content = json.dumps(line).encode() + b"\n"
        with self._errors_told():
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                if os.write(descriptor, content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def _errors_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ModelError(f"the tokens that --restart would go on from cannot be written to {self.path}: {error.strerror}; free some "
                             "space there, set HETERO_ATTN_CACHE_DIR to another folder, or leave --restart out") from None

    def _read(self) -> tuple[list[dict], int]:
        """The whole lines, and how many bytes they take; the last may have been cut off as it was written."""
        found, whole = [], 0
        try:
            content = self.path.read_bytes()
        except OSError:
            return found, whole
        for line in content.splitlines(keepends=True):
            try:
                read = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(read, dict):
                break
            found.append(read)
            whole += len(line)
        return found, whole
