"""A checkpoint's chat template: Jinja text that turns a list of messages into the prompt the model was trained on.

The text comes with the checkpoint and is nobody's code we trust, so it runs in Jinja's immutable sandbox. The names and settings it
may count on (raise_exception, strftime_now, tojson, loop controls, trimmed blocks) are those Hugging Face templates are written for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox

from hetero_attn.models.config import ModelError


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks an assistant's words for training; here its body is simply rendered."""

    tags = {"generation"}      # noqa: RUF012  (jinja2's own form)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes <, > and & for HTML, which a model was never trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template. source: its text; tokens: names it may use beside the messages, such as bos_token.

    Raises ModelError when the text is not a template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.source, self.tokens = source, dict(tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template is not valid Jinja: {error}") from error

    def render(self, messages: Sequence[Mapping], *, add_generation_prompt: bool = True, **variables) -> str:
        """The prompt for messages, each {"role": "system" | "user" | "assistant" | ..., "content": text}.

        Raises ModelError with the template's own words when it refuses them (no system role, roles that do not alternate).
        """
        names = {"tools": None, "documents": None, **self.tokens, **variables}
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **names)
        except Exception as error:                      # a template is a program, and may fail as any program does
            raise ModelError(f"the model's chat template refuses this conversation: {' '.join(str(error).split())}") from error


def find_chat_template(folder: Path, tokenizer_config: Mapping) -> str | None:
    """The directory's default chat template or None: chat_template.jinja, else chat_template.json, else tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{path} is not UTF-8 text (byte {error.start})") from error
    found = tokenizer_config.get("chat_template")
    path = folder / "chat_template.json"
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} is not a JSON object with a chat_template: {error}") from error
    if isinstance(found, list):                                      # older checkpoints list several by name
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    return found if isinstance(found, str) else None
