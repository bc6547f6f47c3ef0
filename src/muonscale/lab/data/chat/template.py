"""A conversation written out by a chat template, and which of it the assistant has said.

Templates that mark the assistant's words with `{% generation %}` say it themselves. For others a turn
is what a conversation up to it has beyond the prompt for it, if that prompt is how it begins.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from muonscale.errors import DataError
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data.chat.conversations import Messages

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
"""Ordinary text and the tokenizer's end of text, for a tokenizer that has no other tokens to mark turns."""

MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
SHOWN = 80
"""Characters of a conversation that an error shows."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation written out."""

    text: str
    spans: list[Span]
    """Where the assistant's turns are, with their ends: first character and the one after the last."""


@dataclass(frozen=True)
class ChatTemplate:
    """How conversations are written out."""

    jinja: str
    name: str
    """What to call it in an error."""
    variables: dict[str, Any]
    """What it may use besides the messages: the special tokens by their names."""
    ends: tuple[str, ...]
    """Spellings of the special tokens."""

    def render(self, messages: Messages) -> Rendered:
        """Write a conversation out.

        Raises:
            DataError: where the template fails, or does not say what the assistant has said.
        """
        text, spans = self._run(messages, marks=bool(MARKED.search(self.jinja)))
        if spans is None:
            spans = self._spans(messages, text)
        spans = [span for span in spans if span[1] > span[0]]
        if not spans:
            raise DataError(
                f"{self.name} marks no words of the assistant in {_shown(messages)}; put them between "
                "{% generation %} and {% endgeneration %} in a template of your own "
                "(data.chat_template=FILE)"
            )
        return Rendered(text, spans)

    def _run(
        self, messages: Messages, *, marks: bool = False, prompt: bool = False
    ) -> tuple[str, list[Span] | None]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [messages],
                chat_template=self.jinja,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except Exception as error:  # a template raises what it likes
            raise DataError(
                f"{self.name} does not take {_shown(messages)}: {error}. Leave it out, or give "
                "another template with data.chat_template"
            ) from error
        found: Any = spans[0] if marks else None
        return texts[0], found

    def _spans(self, messages: Messages, text: str) -> list[Span]:
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before, _ = self._run(messages[:number], prompt=True)
                after, _ = self._run(messages[: number + 1])
                if not (text.startswith(after) and after.startswith(before)):
                    raise self._not_found(messages)
                spans.append((len(before), len(before) + len(self._turn(after[len(before) :]))))
        return spans

    def _turn(self, text: str) -> str:
        """Return a turn without the space after its end, which no model is asked to write."""
        stripped = text.rstrip()
        return stripped if stripped.endswith(self.ends) else text

    def _not_found(self, messages: Messages) -> DataError:
        return DataError(
            f"{self.name} writes the beginning of {_shown(messages)} in another way when the rest "
            "follows, so that the assistant's words cannot be found; put them between "
            "{% generation %} and {% endgeneration %} in a copy of it, and give that with "
            "data.chat_template=FILE"
        )


def _shown(messages: Messages) -> str:
    first = f"{messages[0]['role']}: {messages[0]['content']}" if messages else "nothing"
    return f"the conversation that begins with {first[:SHOWN]!r}"


def chat_template(data: DataSection, tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    """Return the template of a section with chats.

    Raises:
        DataError: if there is none, or its file cannot be read.
    """
    name = f"the chat template of data.tokenizer={data.tokenizer}"
    jinja = given_template(data)
    if jinja is not None:
        name = f"data.chat_template={data.chat_template}"
    else:
        jinja = tokenizer.chat_template
    if isinstance(jinja, dict):
        jinja = jinja.get("default")
    if not jinja:
        raise DataError(
            f"data.tokenizer={data.tokenizer} has no chat template; give one with "
            "data.chat_template=FILE, or take the built-in one with data.chat_template=plain"
        )
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    ends = tuple(token.content for token in added if token.special)
    return ChatTemplate(jinja, name, dict(tokenizer.special_tokens_map), ends)


def given_template(data: DataSection) -> str | None:
    """Return the text of `data.chat_template`, None where the tokenizer's own is to be used.

    Raises:
        DataError: if the file cannot be read.
    """
    if data.chat_template is None:
        return None
    if data.chat_template == "plain":
        return PLAIN
    try:
        return data.chat_template.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.chat_template={data.chat_template} cannot be read: {error}; accepted: a jinja "
            "file, plain"
        ) from error


class Escape:
    """Hides special tokens that messages spell, so that they stay text.

    Every spelling is one character of a private area while the template is at work.
    """

    def __init__(self, spellings: tuple[str, ...]) -> None:
        ordered = sorted(spellings, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or "(?!)")

    def hide(self, messages: Messages) -> tuple[Messages, dict[str, str]]:
        """Return the messages to be written out, and what each hiding character stands for."""
        whole = "".join(message["content"] for message in messages)
        found = sorted(set(self._pattern.findall(whole)))
        if not found:
            return messages, {}
        free = (chr(c) for c in range(0xF0000, 0x10FFFE) if chr(c) not in whole)
        hidden = dict(zip(found, free, strict=False))
        put: Callable[[re.Match[str]], str] = lambda match: hidden[match[0]]  # noqa: E731
        return (
            [
                {**message, "content": self._pattern.sub(put, message["content"])}
                for message in messages
            ],
            {character: spelling for spelling, character in hidden.items()},
        )
