"""Text to token ids and back, from a checkpoint's tokenizer.json through the `tokenizers` library alone.

transformers would do the same behind a far heavier import, so its rules are followed where they decide which ids a model sees: BOS and
the like come from tokenizer.json's own post-processor (the add_bos_token flags beside it are history), padding and truncation stored in
the file do not apply, and the named special tokens count as special. No weights are needed: a prompt can be checked before ranks start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from hetero_attn.models.chat_template import ChatTemplate, find_chat_template
from hetero_attn.models.config import ModelError, read_json

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CONTEXT_TOKENS = 8          # a prompt's last tokens that a continuation is decoded with


class Tokenizer:
    """Encodes and decodes; holds the chat template and the special tokens' ids (bos_id, eos_id: None where there is none)."""

    def __init__(self, backend: tokenizers.Tokenizer, special: Mapping[str, str], *, chat_template: str | None = None):
        self._backend = backend
        backend.no_padding()
        backend.no_truncation()
        self.special = dict(special)
        self.bos_id, self.eos_id = self._special_id("bos_token"), self._special_id("eos_token")
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(
            {token for token, entry in added.items() if entry.special}
            | {token for token in (self._special_id(name) for name in special) if token is not None}
        )
        falls_back = '"ByteFallback"' in backend.to_str()
        self._byte_ids = frozenset(self._id(f"<0x{byte:02X}>") for byte in range(256)) - {None} if falls_back else frozenset()
        self._chat_source = chat_template

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face directory. Raises ModelError when there is none that can be read."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            others = [name for name in ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt") if (folder / name).exists()]
            found = f" (only {', '.join(others)})" if others else ""
            raise ModelError(
                f"{folder} has no tokenizer.json{found}; make one with transformers: "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:        # the library raises bare Exception for whatever is wrong with the file
            raise ModelError(f"{file} is not a tokenizer that tokenizers {tokenizers.__version__} can read: {error}") from error
        config = read_json(folder / "tokenizer_config.json", optional=True)
        special = _special_tokens(read_json(folder / "special_tokens_map.json", optional=True)) | _special_tokens(config)
        return cls(backend, special, chat_template=find_chat_template(folder, config))

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template. Compiled when first asked for: plain text needs no sound one. Raises ModelError."""
        return None if self._chat_source is None else ChatTemplate(self._chat_source, self.special)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text; special tokens written out in it become their ids. add_special_tokens: BOS and the like, as the file says.

        Raises ModelError for text that is no Unicode: half a surrogate pair, which Python puts where bytes were not UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ModelError(f"a text holds {text[error.start]!r} at character {error.start}, which is not Unicode text; "
                             "give it as UTF-8") from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([token for token in ids if token not in self.special_ids], skip_special_tokens=True)

    def continuation_context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The tokens before a continuation that its text depends on: a decoder strips the space before the first token it is given.

        Empty where the prompt ends inside a character (possible only for prompts given as ids).
        """
        context = [token for token in prompt_ids if token not in self.special_ids][-CONTEXT_TOKENS:]
        return [] if self.ends_inside_character(context, self.decode(context)) else context

    def decode_continuation(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text that ids add after prompt_ids: prompt text + this = text of both, leading spaces included."""
        context = self.continuation_context(prompt_ids)
        return self.decode([*context, *ids])[len(self.decode(context)):]

    def ends_inside_character(self, ids: Sequence[int], text: str) -> bool:
        """True when the next token could still change the end of text, the decoded ids."""
        # A byte-fallback decoder judges a run of byte tokens as a whole: until the run ends, nothing of it is settled.
        return text.endswith("\ufffd") or (bool(ids) and ids[-1] in self._byte_ids)

    def chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The prompt text for a conversation (encode it with add_special_tokens=False). Raises ModelError without a chat template."""
        if self.chat_template is None:
            raise ModelError("this model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
                             "leave --chat out and write the prompt as the model expects it")
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)

    def _id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def _special_id(self, name: str) -> int | None:
        return self._id(self.special[name]) if name in self.special else None


def _special_tokens(config: Mapping) -> dict[str, str]:
    values = {name: config.get(name) for name in SPECIAL_NAMES}
    values = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: value for name, value in values.items() if isinstance(value, str)}
