"""Conversations rendered by a chat template, and the spans of the assistant's turns.

A template may mark these spans with `{% generation %}`. Without marks, the span of a turn is found
by rendering the conversation up to the turn and the prompt for the turn: it is the text after the
prompt, provided that the conversation begins with the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from muonscale.errors import DataError
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data.chat.conversations import Messages
from muonscale.lab.files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLAIN = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {{- 'Assistant:\\n' -}}
    {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {{- '\\n' -}}
  {%- else -%}
    {{- message['role'].capitalize() + ':\\n' + message['content'] + '\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}
"""
"""Plain text and the end of text, for a tokenizer without special tokens for turns."""

MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
SHOWN = 80
"""Characters of a conversation in an error."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation."""

    text: str
    spans: list[Span]
    """The assistant's turns with their ends: first character and the one after the last."""


@dataclass(frozen=True)
class ChatTemplate:
    """How conversations are rendered."""

    jinja: str
    name: str
    """Its name in errors."""
    variables: dict[str, Any]
    """Variables besides the messages: the special tokens by their names."""
    ends: tuple[str, ...]
    """Spellings of the special tokens."""

    def render(self, messages: Messages, tools: list[Any] | None = None) -> Rendered:
        """Render a conversation.

        Args:
            messages: the messages.
            tools: the tools that the assistant may call, as JSON schemas.

        Raises:
            DataError: if the template fails, leaves out the tools, or the assistant's turns cannot
                be found.
        """
        for key, used in (
            ("tools", tools),
            ("tool_calls", any("tool_calls" in message for message in messages)),
            ("tool", any(message["role"] == "tool" for message in messages)),
        ):
            if used and key not in self.jinja:
                raise DataError(
                    f"{self.name} does not write {key!r}, which {_excerpt(messages)} has; give a "
                    "template that does with data.chat_template=FILE"
                )
        text, spans = self._run(messages, tools, marks=bool(MARKED.search(self.jinja)))
        if spans is None:
            spans = self._spans(messages, tools, text)
        spans = [span for span in spans if span[1] > span[0]]
        if not spans:
            raise DataError(
                f"{self.name} marks no words of the assistant in {_excerpt(messages)}; put them "
                "between {% generation %} and {% endgeneration %} in a template of your own "
                "(data.chat_template=FILE)"
            )
        return Rendered(text, spans)

    def _run(
        self,
        messages: Messages,
        tools: list[Any] | None,
        *,
        marks: bool = False,
        prompt: bool = False,
    ) -> tuple[str, list[Span] | None]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.jinja,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except Exception as error:  # a template can raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
            raise DataError(
                f"{self.name} refuses {_excerpt(messages)}: {reason}; remove the conversation, or "
                "give another template with data.chat_template"
            ) from error
        found: Any = spans[0] if marks else None
        return texts[0], found

    def _spans(self, messages: Messages, tools: list[Any] | None, text: str) -> list[Span]:
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before, _ = self._run(messages[:number], tools, prompt=True)
                after, _ = self._run(messages[: number + 1], tools)
                if not (text.startswith(after) and after.startswith(before)):
                    raise DataError(
                        f"{self.name} renders the beginning of {_excerpt(messages)} differently "
                        "when more messages follow, so that the assistant's words cannot be found; "
                        "put them between {% generation %} and {% endgeneration %} in a copy of "
                        "the template, and give that with data.chat_template=FILE"
                    )
                spans.append((len(before), len(before) + len(self._turn(after[len(before) :]))))
        return spans

    def _turn(self, text: str) -> str:
        """Return a turn without the white space after its end, which a model need not write."""
        stripped = text.rstrip()
        return stripped if stripped.endswith(self.ends) else text


def _excerpt(messages: Messages) -> str:
    first = f"{messages[0]['role']}: {messages[0]['content']}" if messages else "nothing"
    return f"the conversation that begins with {first[:SHOWN]!r}"


def find_template(data: DataSection, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    """Return the chat template of a data section.

    Raises:
        DataError: if there is none, or its file cannot be read.
    """
    name, jinja = f"data.chat_template={data.chat_template}", read_template(data)
    if jinja is None:
        name, jinja = (
            f"the chat template of data.tokenizer={data.tokenizer}",
            tokenizer.chat_template,
        )
    if isinstance(jinja, dict):
        jinja = jinja.get("default")
    if not jinja:
        raise DataError(
            f"data.tokenizer={data.tokenizer} has no chat template; give one with "
            "data.chat_template=FILE, or use the built-in data.chat_template=plain"
        )
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    ends = tuple(token.content for token in added if token.special)
    return ChatTemplate(jinja, name, dict(tokenizer.special_tokens_map), ends)


def read_template(data: DataSection) -> str | None:
    """Return the text of `data.chat_template`, None for the tokenizer's own.

    Raises:
        DataError: if the file cannot be read.
    """
    if data.chat_template is None:
        return None
    if data.chat_template == "plain":
        return PLAIN
    try:
        return read_text(data.chat_template.expanduser())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.chat_template={data.chat_template} cannot be read: {error}; accepted: a jinja "
            "file, plain"
        ) from error


class Escape:
    """Hides special tokens that messages spell out, so that they stay text.

    While a template renders, each is replaced by one character of a private use area.
    """

    def __init__(self, spellings: tuple[str, ...]) -> None:
        ordered = sorted(spellings, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or "(?!)")

    def hide(self, conversation: tuple[Messages, Any]) -> tuple[Any, dict[str, str]]:
        """Return messages and tools to render, and the spelling of each private character."""
        whole = "".join(_texts(conversation))
        found = sorted(set(self._pattern.findall(whole)))
        if not found:
            return conversation, {}
        free = (chr(c) for c in range(0xF0000, 0x10FFFE) if chr(c) not in whole)
        hidden = dict(zip(found, free, strict=False))
        escaped = _replace(
            conversation, lambda text: self._pattern.sub(lambda m: hidden[m[0]], text)
        )
        for message, hiding in zip(conversation[0], escaped[0], strict=True):
            hiding["role"] = message["role"]  # the template compares it
        return escaped, {character: spelling for spelling, character in hidden.items()}


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in messages and tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        for item in items:
            yield from _texts(item)


def _replace(value: Any, change: Callable[[str], str]) -> Any:
    """Return messages and tools with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _replace(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replace(item, change) for item in value)
    return value
