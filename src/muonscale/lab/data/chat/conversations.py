"""Conversations as text: records of several kinds are checked and written in one form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from muonscale.errors import DataError
from muonscale.lab.data.files import ErrorsT, clean_text, missing_field

ROLES = ("system", "user", "assistant", "tool")
FIELDS = ("messages", "conversations")
"""Fields that hold a conversation, unless data.field names another."""
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}
"""Values of `from` in the format of ShareGPT, and the roles that they are."""

Message = dict[str, Any]
"""A message: role, content, and for tools tool_calls, tool_call_id and name."""
Messages = list[Message]

SHAPE = "a conversation is a list of {role, content}, both text (data.field, data.format)"


@dataclass(frozen=True)
class Conversation:
    """Takes the conversation of a record: messages, those of ShareGPT, or an instruction of Alpaca."""

    field: str | None
    """The field that holds it; None for `messages`, `conversations` or the keys of Alpaca."""
    errors: ErrorsT
    columns: None = None
    """All columns of a table are read."""

    def __call__(self, record: dict[str, Any], place: str) -> str:
        """Return the conversation as JSON, see `conversation_text`.

        Raises:
            DataError: if the record holds none.
        """
        fields = (self.field,) if self.field is not None else FIELDS
        field = next((name for name in fields if name in record), None)
        if field is not None:
            value, tools = record[field], record.get("tools")
        elif self.field is None and {"instruction", "output"} <= record.keys():
            value, tools, field = _from_alpaca(record), None, "instruction"
        else:
            raise missing_field(fields[0], list(record), place)
        return conversation_text(value, field=field, errors=self.errors, place=place, tools=tools)


def _from_alpaca(record: dict[str, Any]) -> list[dict[str, Any]]:
    asked = record["instruction"]
    if isinstance(asked, str) and record.get("input"):
        asked = f"{asked}\n\n{record['input']}"
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": record["output"]},
    ]


def conversation_text(
    value: Any, *, field: str, errors: ErrorsT, place: str, tools: Any = None
) -> str:
    """Return a record's conversation as JSON; equal roles and contents give equal text.

    Other keys of a message are ignored.

    Args:
        value: the value of the field in the record.
        field: name of the field, for errors.
        errors: what to do with lone surrogates, as in `clean_text`.
        place: file and line or row, for errors.
        tools: the tools that the assistant may call, as JSON schemas or a text of them.

    Raises:
        DataError: for anything but a list of {role, content} or of {from, value} with a turn of
            the assistant.
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
    tools = _parse(tools, list, f"'tools' in {place}") if tools else None
    whole = {"messages": messages, "tools": tools} if tools else messages
    text = json.dumps(whole, ensure_ascii=False, separators=(",", ":"))
    return clean_text(text, field=field, errors=errors, place=place)


def _message(item: Any, errors: ErrorsT, place: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"{place} is {_kind(item)}; {SHAPE}")
    if "role" not in item and {"from", "value"} <= item.keys():
        item = {"role": _sharegpt_role(item["from"], place), "content": item["value"]}
    calls = item.get("tool_calls") or None
    if calls and item.get("content") is None:
        item = {**item, "content": ""}
    for key in ("role", "content"):
        if key not in item:
            has = ", ".join(map(repr, item)) or "nothing"
            raise DataError(f"no {key!r} in {place}; it has {has}; {SHAPE}")
    content = item["content"]
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in content)
    for key, text in (("role", item["role"]), ("content", content)):
        if not isinstance(text, str):
            raise DataError(f"{key!r} is {_kind(text)} in {place}; it must be text")
    role = item["role"]
    if role not in ROLES:
        raise DataError(f"role {role!r} in {place}; accepted: {', '.join(ROLES)}")
    content = clean_text(content, field="content", errors=errors, place=place)
    message: Message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = [_tool_call(call, place) for call in _parse(calls, list, place)]
    if role == "tool":
        kept = {key: item.get(key) for key in ("tool_call_id", "name")}
        message |= {key: value for key, value in kept.items() if isinstance(value, str)}
    return message


def _sharegpt_role(name: Any, place: str) -> str:
    if name not in SHAREGPT_ROLES:
        raise DataError(f"'from' is {name!r} in {place}; accepted: {', '.join(SHAREGPT_ROLES)}")
    return SHAREGPT_ROLES[name]


def _part(part: Any, place: str) -> Any:
    """Return the text of a content part."""
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    raise DataError(f"a content part in {place} is {kind!r}; only parts with 'text' are read")


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    """Return a call as chat templates expect it, with the arguments as a mapping."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"a tool call in {place} has no function with a name")
    arguments = _parse(
        function.get("arguments") or {}, dict, f"arguments of a tool call in {place}"
    )
    known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {
        **known,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _parse(value: Any, kind: type, what: str) -> Any:
    """Return a value, or the JSON in a text, of a kind."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{what}: not JSON: {error}") from error
    if not isinstance(value, kind):
        raise DataError(f"{what} is {_kind(value)} and not {kind.__name__}")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def read_conversation(text: str) -> tuple[Messages, list[Any] | None]:
    """Return the messages in a text of `conversation_text`, and the tools, None without any."""
    whole = json.loads(text)
    return (whole["messages"], whole["tools"]) if isinstance(whole, dict) else (whole, None)
