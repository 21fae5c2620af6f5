"""Tokenizer against transformers' own, streaming against decoding at once for any token ids, stop strings against a search by hand."""

import json

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_checkpoint import CHAT, TEXT, byte_fallback, byte_level, write_tokenizer

from hetero_attn.models.config import ModelError
from hetero_attn.models.text_stream import StopFilter, StreamingDecoder
from hetero_attn.models.tokenizer import Tokenizer

LLAMA3 = (
    "{%- set date_string = strftime_now('%d %b %Y') %}\n{{- bos_token }}\n"
    "{%- for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n\\n'+ message['content'] | trim + '<|im_end|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n\\n' + date_string }}\n{%- endif %}\n"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %}{% generation %}{{ message['content'] }}{% endgeneration %}{{ eos_token }}{% endif %}{% endfor %}"
)
JSON_LOOPS = (
    "  {% for message in messages %}\n  {% if loop.index > 3 %}{% break %}{% endif %}\n"
    "{{ message | tojson }} {{ {'a': '<b>&é'} | tojson(indent=2) }}\n    {% endfor %}\n"
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ tools is none }}"
)
MESSAGES = [
    {"role": "user", "content": "Hello <there> & 東京"}, {"role": "assistant", "content": " fine \n"},
    {"role": "user", "content": "and you?"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    llama2 = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {"byte_level": write_tokenizer(root / "a"), "byte_fallback": write_tokenizer(root / "b", byte_fallback(), **llama2)}


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_ids_and_text_equal_transformers(folders, kind):
    ours = Tokenizer.from_dir(folders[kind])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folders[kind])
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in [*TEXT[:5], "", " leading", "tail ", "<|end|>x", "\x00\u200d"]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids and ids[0] == ours.bos_id
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_stored_padding_and_truncation_do_not_apply(tmp_path):
    stored = byte_level()
    stored.enable_padding(length=40)
    stored.enable_truncation(4)
    ours = Tokenizer.from_dir(write_tokenizer(tmp_path, stored))
    assert ours.encode(TEXT[0]) == byte_level().encode(TEXT[0]).ids


@pytest.mark.parametrize("template", [CHAT, LLAMA3, MISTRAL, JSON_LOOPS])
def test_chat_templates_render_as_in_transformers(tmp_path, template):
    folder = write_tokenizer(tmp_path, chat_template=template)
    ours, theirs = Tokenizer.from_dir(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for prompted in (True, False):
        text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompted)
        assert ours.chat(MESSAGES, add_generation_prompt=prompted) == text and "Hello" in text
        assert ours.encode(text, add_special_tokens=False) == theirs.apply_chat_template(
            MESSAGES, add_generation_prompt=prompted, return_dict=False)


def test_a_template_is_found_where_checkpoints_keep_it(tmp_path):
    for number, (file, content) in enumerate({
        "chat_template.jinja": "J {{ messages[0].content }}",
        "chat_template.json": json.dumps({"chat_template": "J {{ messages[0].content }}"}),
    }.items()):
        folder = write_tokenizer(tmp_path / str(number))
        (folder / file).write_text(content, encoding="utf-8")
        assert Tokenizer.from_dir(folder).chat([{"role": "user", "content": "x"}]) == "J x"
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert Tokenizer.from_dir(write_tokenizer(tmp_path / "named", chat_template=named)).chat([]) == "D"


def test_template_errors_are_one_clear_line(tmp_path):
    def chat(template, messages=MESSAGES):
        return Tokenizer.from_dir(write_tokenizer(tmp_path, chat_template=template)).chat(messages)

    with pytest.raises(ModelError, match="no chat template"):
        chat(None)
    with pytest.raises(ModelError, match="not valid Jinja"):
        chat("{% if %}")
    with pytest.raises(ModelError, match="refuses this conversation: no system role"):
        chat(MISTRAL, [{"role": "system", "content": "be brief"}])
    with pytest.raises(ModelError, match="refuses this conversation"):                  # the sandbox: a template is not our code
        chat("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ModelError, match="refuses this conversation"):
        chat("{{ messages.append(1) }}")
    for failing in ("{{ 1 / 0 }}", "{{ range(10**9) }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"):
        with pytest.raises(ModelError, match="refuses this conversation"):
            chat(failing)


def test_plain_text_needs_no_sound_template_but_must_be_unicode(tmp_path):
    tokenizer = Tokenizer.from_dir(write_tokenizer(tmp_path, chat_template="{% if %}"))
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"
    with pytest.raises(ModelError, match=r"'\\udcff' at character 1, which is not Unicode text"):
        tokenizer.encode("a\udcff")                    # what Python makes of the argument b"a\xff"


def test_directories_without_a_usable_tokenizer(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(ModelError, match=r"no tokenizer.json \(only tokenizer.model\); make one with transformers"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        Tokenizer.from_dir(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ModelError, match="expected a JSON object"):
        Tokenizer.from_dir(tmp_path)


BACKENDS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}
LOADED = {
    "byte_level": Tokenizer(BACKENDS["byte_level"], {"bos_token": "<|begin|>"}),
    "byte_fallback": Tokenizer(BACKENDS["byte_fallback"], {"bos_token": "<s>"}),
}


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_joined_are_the_whole_for_any_ids(kind, data):
    tokenizer = LOADED[kind]
    ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=14)
    prompt, output = data.draw(ids), data.draw(ids)
    stream = StreamingDecoder(tokenizer, prompt)
    pieces = [stream.push(token) for token in output]
    assert "".join(pieces) + stream.flush() == tokenizer.decode_continuation(prompt, output)
    assert not any(piece.endswith("\ufffd") for piece in pieces)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_characters_come_whole_and_at_once(kind):
    tokenizer = LOADED[kind]
    for text in ("naïve 東京 🙂🙃 done", " two  spaces", "plain"):
        prompt, ids = tokenizer.encode("say", add_special_tokens=False), tokenizer.encode(text, add_special_tokens=False)
        stream, pieces = StreamingDecoder(tokenizer, prompt), []
        for token in ids:
            pieces.append(stream.push(token))
        rest = stream.flush()
        assert "".join(pieces) + rest == tokenizer.decode_continuation(prompt, ids)
        assert ("".join(pieces) + rest).strip() == text.strip()
        assert not rest or kind == "byte_fallback"                # there, a run of byte tokens at the end waits for the flush
        if text == "plain":
            assert kind == "byte_fallback" or all(pieces)        # nothing is held back without need
    if kind == "byte_fallback":                                     # the space before the first new word belongs to the text
        assert tokenizer.decode_continuation(tokenizer.encode("Hello"), tokenizer.encode("world", add_special_tokens=False)) == " world"


def test_half_a_character_at_the_end_is_marked_not_lost():
    tokenizer = LOADED["byte_level"]
    ids = tokenizer.encode("🙃", add_special_tokens=False)
    assert len(ids) > 1
    stream = StreamingDecoder(tokenizer)
    assert [stream.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.flush() == "\ufffd"


def first_stop(text, stops):
    """Text before the stop string that is complete first, one character at a time."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(st.lists(st.text("ab\n", max_size=4), max_size=10), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
@example(["a", "b", "a", "b", "b"], ["abb"])
@example(["xab"], ["b", "ab"])
@settings(max_examples=400, deadline=None)
def test_stop_strings_cut_where_a_slow_search_would(pieces, stops):
    stop_filter, shown = StopFilter(stops), ""
    expected, stopped = first_stop("".join(pieces), stops)
    for count, piece in enumerate(pieces, start=1):
        shown += stop_filter.push(piece)
        so_far = "".join(pieces[:count])
        if not first_stop(so_far, stops)[1]:            # held back: exactly the longest end that could still become a stop string
            held = max((size for stop in stops for size in range(len(stop)) if so_far.endswith(stop[:size])), default=0)
            assert shown == so_far[: len(so_far) - held]
    assert (stop_filter.matched is not None) == stopped
    assert shown + stop_filter.flush() == expected


@pytest.mark.parametrize("fault", ["deep", "directory"])
def test_a_side_file_that_cannot_be_read_is_one_line(tmp_path, fault):
    write_tokenizer(tmp_path, byte_level())
    side = tmp_path / "special_tokens_map.json"
    side.unlink(missing_ok=True)
    side.mkdir() if fault == "directory" else side.write_text("[" * 100_000)
    with pytest.raises(ModelError, match=r"special_tokens_map\.json cannot be read"):
        Tokenizer.from_dir(tmp_path)
