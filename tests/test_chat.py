"""Conversations: what is taught of them, and which are refused, by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from openmoba.lab.config import DataConfig
from openmoba.lab.data.chat import encode_chat
from openmoba.lab.data.corpus import open_corpus
from openmoba.lab.data.load import Data, load_data
from openmoba.lab.data.tokenizer import byte_tokenizer

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}

STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CALLING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function.name }}</call>{% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer_with(template: str | None = None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def chats(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def load(source: Path, tmp_path: Path, **options: Any) -> Data:
    values = {"tokenizer": "bytes", "length": 64, "hold_out": 2, "cache": str(tmp_path / "cache"), **options}
    return load_data(DataConfig(source=str(source), column="messages", **values))


def taught(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    token_T, written_T = encode_chat(tokenizer, messages)
    return str(tokenizer.decode(token_T[written_T]))


def read(tmp_path: Path, *messages: Any) -> Any:
    return next(open_corpus(str(chats(tmp_path / "a.jsonl", list(messages))), "messages").documents())


def test_content_that_is_null_or_missing_is_empty(tmp_path: Path) -> None:
    for nothing in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        messages = read(tmp_path, USER, nothing)
        assert messages == [USER, {"role": "assistant", "content": ""}]
        assert "None" not in byte_tokenizer().decode(encode_chat(byte_tokenizer(), messages)[0])


def test_content_of_text_parts_is_their_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo", "image": None}, "!"]
    messages = read(tmp_path, USER, {"role": "assistant", "content": parts})
    assert messages[1] == {"role": "assistant", "content": "hello!"}


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "only text can be trained on"),
        ({"role": "user", "content": 3}, "content of a message is a text or a list of text parts, got 3"),
        ({"role": "user", "content": {"text": "x"}}, "content of a message is a text or a list of text parts"),
        ({"content": "x"}, "a list of messages with roles"),
        ({"role": None, "content": "x"}, "a list of messages with roles"),
        ("hi", "a list of messages with roles"),
    ],
)
def test_what_is_no_message_is_refused_with_its_row(message: Any, error: str, tmp_path: Path) -> None:
    source = chats(tmp_path / "a.jsonl", [USER, ASSISTANT], [USER, message])
    with pytest.raises(ValueError, match=rf"a\.jsonl, row 2, message 2: .*{error}"):
        load(source, tmp_path)


def test_columns_that_other_messages_have_are_no_part_of_a_message(tmp_path: Path) -> None:
    """Parquet gives every message all fields, null where it has none."""
    rows = [[USER, {**ASSISTANT, "name": "bot"}], [USER, ASSISTANT]]
    parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "a.parquet")
    chats(tmp_path / "a.jsonl", *rows)
    sources = [open_corpus(str(tmp_path / name), "messages") for name in ("a.parquet", "a.jsonl")]
    assert list(sources[0].documents()) == list(sources[1].documents()) == rows


def test_conversations_without_the_assistant_are_refused_for_that(tmp_path: Path) -> None:
    source = chats(tmp_path / "chat.jsonl", *([{"role": "user", "content": f"hello {n} " * 9}] for n in range(6)))
    for length in (16, 640):
        with pytest.raises(ValueError, match="none of 3 conversations has words of the assistant's to learn"):
            load(source, tmp_path, length=length)


def test_an_assistant_may_begin() -> None:
    end = byte_tokenizer().eos_token
    assert taught(byte_tokenizer(), [ASSISTANT]) == f"hello{end}\n"
    assert taught(byte_tokenizer(), [ASSISTANT, USER, ASSISTANT]) == f"hello{end}\n" * 2


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last or m.role == 'user' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[model]{% endif %}",
    ],
    ids=["earlier answers", "the mark of an answer"],
)
def test_a_template_that_rewrites_what_was_there_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode_chat(tokenizer_with(template), [USER, ASSISTANT, USER, ASSISTANT])


def test_an_assistant_that_begins_is_refused_where_its_turn_has_no_mark(tmp_path: Path) -> None:
    unmarked = tokenizer_with("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    with pytest.raises(ValueError, match="opens with the assistant, and the chat template does not say where"):
        encode_chat(unmarked, [ASSISTANT])
    unmarked.save_pretrained(tmp_path / "unmarked")
    source = chats(tmp_path / "a.jsonl", [USER, ASSISTANT], [USER, USER], [ASSISTANT, USER])
    with pytest.raises(ValueError, match=r"the conversation a\.jsonl:3 of \S+ cannot be used: it opens with"):
        load(source, tmp_path, tokenizer=str(tmp_path / "unmarked"))


@pytest.mark.parametrize("odd", [0, 2, 8])
def test_a_text_among_conversations_is_refused(odd: int, tmp_path: Path) -> None:
    rows: list[Any] = [[USER, {"role": "assistant", "content": f"{n} " * 30}] for n in range(9)]
    rows[odd] = "a plain text"
    other = 2 if odd == 0 else odd + 1
    with pytest.raises(ValueError, match=rf"mixes texts and conversations: a\.jsonl:1 is a .*, a\.jsonl:{other} a "):
        load(chats(tmp_path / "a.jsonl", *rows), tmp_path)


def test_a_template_that_raises_names_the_row_and_the_reason(tmp_path: Path) -> None:
    tokenizer_with(STRICT).save_pretrained(tmp_path / "strict")
    source = chats(tmp_path / "a.jsonl", [USER, ASSISTANT], [USER, ASSISTANT, USER], [USER, USER, ASSISTANT])
    message = r"the conversation a\.jsonl:3 of \S+ cannot be used: the chat template refuses it: roles must alternate"
    with pytest.raises(ValueError, match=message):
        load(source, tmp_path, tokenizer=str(tmp_path / "strict"))


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_tool_calls_that_the_template_does_not_render_are_refused(key: str, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", key: CALL["tool_calls"]}
    source = chats(tmp_path / "a.jsonl", [USER, ASSISTANT], [USER, call, {"role": "tool", "content": "1"}, ASSISTANT])
    with pytest.raises(ValueError, match=rf"a\.jsonl:2 of .*message 2 has {key}, which the chat template does not"):
        load(source, tmp_path)


def test_tool_calls_that_are_rendered_are_taught(tmp_path: Path) -> None:
    messages = read(tmp_path, USER, CALL, {"role": "tool", "content": "1"}, ASSISTANT)
    assert taught(tokenizer_with(CALLING), messages) == "<call>add</call>;hello;"
    assert taught(tokenizer_with(CALLING), [USER, ASSISTANT]) == "hello;"


def test_conversations_that_differ_in_a_call_are_two(tmp_path: Path) -> None:
    """Documents are told apart by all they hold: of copies, one is trained on."""
    calls = [{**CALL, "tool_calls": [{"function": {"name": name}}]} for name in ("add", "sub", "add")]
    tokenizer_with(CALLING).save_pretrained(tmp_path / "calling")
    source = chats(tmp_path / "a.jsonl", *([USER, call] for call in calls), *([USER, ASSISTANT],) * 2)
    data = load(source, tmp_path, tokenizer=str(tmp_path / "calling"), hold_out=3)
    documents = [*np.unique(data.train.documents), *np.unique(data.valid.documents)]
    assert sorted(documents) == [0, 1, 3]
