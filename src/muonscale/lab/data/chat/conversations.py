"""Conversations as text: records are checked and written in one form."""

from __future__ import annotations

import json
from typing import Any

from muonscale.errors import DataError
from muonscale.lab.data.files import ErrorsT, clean_text

ROLES = ("system", "user", "assistant")

Messages = list[dict[str, str]]

SHAPE = "a conversation is a list of {role, content}, both text (data.field, data.format)"


def conversation_text(value: Any, *, field: str, errors: ErrorsT, place: str) -> str:
    """Return a record's conversation as JSON; equal roles and contents give equal text.

    Other keys of a message are ignored.

    Args:
        value: the value of the field in the record.
        field: name of the field, for errors.
        errors: what to do with lone surrogates, as in `clean_text`.
        place: file and line or row, for errors.

    Raises:
        DataError: for anything but a list of {role, content} with a turn of the assistant.
    """
    if not isinstance(value, list):
        raise DataError(f"{field!r} is {_kind(value)} in {place}; {SHAPE}")
    messages = [
        _message(item, errors, f"message {number} of {field!r} in {place}")
        for number, item in enumerate(value, 1)
    ]
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{field!r} has no turn of the assistant in {place}, and only its turns are learned"
        )
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":"))


def _message(item: Any, errors: ErrorsT, place: str) -> dict[str, str]:
    if not isinstance(item, dict):
        raise DataError(f"{place} is {_kind(item)}; {SHAPE}")
    for key in ("role", "content"):
        if key not in item:
            has = ", ".join(map(repr, item)) or "nothing"
            raise DataError(f"no {key!r} in {place}; it has {has}; {SHAPE}")
        if not isinstance(item[key], str):
            raise DataError(f"{key!r} is {_kind(item[key])} in {place}; it must be text")
    role = item["role"]
    if role not in ROLES:
        raise DataError(f"role {role!r} in {place}; accepted: {', '.join(ROLES)}")
    content = clean_text(item["content"], field="content", errors=errors, place=place)
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def read_conversation(text: str) -> Messages:
    """Return the messages in a text of `conversation_text`."""
    return json.loads(text)
