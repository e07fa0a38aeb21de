"""Conversations: messages as documents hold them, their texts, and the tokens that the assistant wrote."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

Message = dict[str, Any]
Messages = list[Message]
"""Messages `{"role": ..., "content": ...}`, whose content is a text; an assistant's may have `tool_calls`."""

_CALLS = ("tool_calls", "function_call")


def messages_of(values: list[Any], where: str) -> Messages:
    """Return the messages of a row: a content that is left out or null is empty, and one of text parts is their text.

    Raises:
        ValueError: what is no message, or holds more than text, with the row.
    """
    return [_message(value, f"{where}, message {number}") for number, value in enumerate(values, 1)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise ValueError(
            f"{where}: a document is a text or a list of messages with roles, as {{'role': 'user', 'content': 'Hi'}}, "
            f"got {value!r:.80}"
        )
    others = {key: other for key, other in value.items() if other not in (None, [], {}) and key != "content"}
    return {**others, "content": _text(value.get("content"), where)}


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(part, where) for part in content)
    raise ValueError(f"{where}: the content of a message is a text or a list of text parts, got {content!r:.80}")


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ValueError(f"{where}: only text can be trained on, got a part {part!r:.80}; leave such rows out")


def content_of(messages: Messages) -> str:
    """Return all that a conversation says, as one text that tells conversations apart."""
    return "\n".join(json.dumps(message, sort_keys=True, ensure_ascii=False) for message in messages)


def encode_chat(tokenizer: Any, messages: Messages) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise a conversation through the chat template, int64, and say which the assistant wrote, bool.

    An assistant's turn is what the template adds to the conversation before it and its generation prompt.

    Raises:
        ValueError: the template does not take this conversation, or hides a part of it.
    """
    text = _render(tokenizer, messages)
    _check_calls(tokenizer, messages, text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    start_T = np.asarray([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    written_T = np.zeros(len(start_T), dtype=bool)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        answer = _render(tokenizer, messages[: turn + 1])
        begin = _begin(tokenizer, messages[:turn], answer)
        if not text.startswith(answer):
            raise ValueError(_REWRITES)
        written_T |= (start_T >= begin) & (start_T < len(answer))
    return np.asarray(encoded["input_ids"], dtype=np.int64), written_T


_REWRITES = (
    "the chat template rewrites earlier turns, so the assistant's tokens cannot be told apart; use a tokenizer whose "
    "template only appends"
)


def _begin(tokenizer: Any, before: Messages, answer: str) -> int:
    """Return where in the rendered conversation the assistant's last turn begins, behind its generation prompt."""
    if before:
        prompt = _render(tokenizer, before, add_generation_prompt=True)
        if not answer.startswith(prompt):
            raise ValueError(_REWRITES)
        return len(prompt)
    # No template renders nothing: the prompt is what it adds to some other conversation.
    asked = [{"role": "user", "content": "?"}]
    prompt = _render(tokenizer, asked, add_generation_prompt=True)[len(_render(tokenizer, asked)) :]
    place = answer.find(prompt)
    if not prompt or place < 0:
        raise ValueError("it opens with the assistant, and the chat template does not say where that turn begins")
    return place + len(prompt)


def _check_calls(tokenizer: Any, messages: Messages, text: str) -> None:
    """Raise ValueError if a message's tool calls leave no trace in the text."""
    for turn, message in enumerate(messages):
        for key in _CALLS:
            if key not in message:
                continue
            without = {name: value for name, value in message.items() if name != key}
            if _render(tokenizer, [*messages[:turn], without, *messages[turn + 1 :]]) == text:
                raise ValueError(
                    f"message {turn + 1} has {key}, which the chat template does not render; leave such rows out, or "
                    "use a tokenizer whose template does"
                )


def _render(tokenizer: Any, messages: Messages, add_generation_prompt: bool = False) -> str:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which chat data needs")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except TemplateError as error:
        raise ValueError(
            f"the chat template refuses it: {error}; leave such rows out, or use another tokenizer"
        ) from error
