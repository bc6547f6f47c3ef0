"""Conversations to tokens and targets, in batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from muonscale.errors import DataError
from muonscale.lab.data.chat.conversations import read_conversation
from muonscale.lab.data.chat.store import FLAG, NUMBER
from muonscale.lab.data.chat.template import ChatTemplate, Escape, Rendered
from muonscale.lab.data.tokens import TokenWriter, token_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Text tokenized at once, on all cores.
BATCH_BYTES = 1 << 20

Encoded = tuple[NDArray[np.int64], NDArray[np.bool_]]


class ChatEncoder:
    """Turns conversations into tokens and targets.

    Special tokens that a template writes become these tokens; those that a message spells do not.

    Args:
        tokenizer: left as it is.
        template: of the conversations.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> None:
        from tokenizers import Tokenizer, processors

        self._template = template
        self._escape = Escape(template.ends)
        copy = tokenizer.backend_tokenizer.to_str()
        self._tokens, self._plain = Tokenizer.from_str(copy), Tokenizer.from_str(copy)
        for backend in (self._tokens, self._plain):
            # The tokenizer's own may leave spaces out of the places of tokens.
            backend.post_processor = processors.Sequence([])  # pyrefly: ignore
        self._tokens.encode_special_tokens = False
        self._plain.encode_special_tokens = True

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Return token ids, int64 `[tokens]`, and which of them are targets, of conversations.

        Args:
            texts: as `conversation_text` writes them.

        Raises:
            DataError: for a conversation that the template does not take.
        """
        parts = []
        for number, text in enumerate(texts):
            messages, hidden = self._escape.hide(read_conversation(text))
            rendered = self._template.render(messages)
            parts.append((rendered, list(_cut(number, rendered.text, hidden))))
        flat = [piece for _, pieces in parts for piece in pieces]
        found = {
            True: iter(self._run(flat, hidden=True)),
            False: iter(self._run(flat, hidden=False)),
        }
        return [
            _joined(rendered, [(piece, next(found[piece[3]])) for piece in pieces])
            for rendered, pieces in parts
        ]

    def _run(self, pieces: list[Piece], *, hidden: bool) -> list[Any]:
        backend = self._plain if hidden else self._tokens
        texts = [text for _, _, text, spelled in pieces if spelled == hidden]
        return backend.encode_batch(texts, add_special_tokens=False)


Piece = tuple[int, int, str, bool]
"""Number of the conversation, place in its text, what is tokenized, whether it was hidden."""


def _cut(number: int, text: str, hidden: dict[str, str]) -> Iterator[Piece]:
    """Yield the parts of a text between hidden spellings, and these."""
    at = 0
    for part in re.split(f"([{''.join(hidden)}])", text) if hidden else [text]:
        yield number, at, hidden.get(part, part), part in hidden
        at += len(part)


def _joined(rendered: Rendered, parts: list[tuple[Piece, Any]]) -> Encoded:
    ids, places = [], []
    for (_, start, _, spelled), encoding in parts:
        ids.append(np.array(encoding.ids, dtype=np.int64))
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        places.append(start + np.array([[0, 1]] * len(offsets)) if spelled else start + offsets)
    first, end = np.concatenate(places).T
    spans = np.array(rendered.spans)
    # A token is the assistant's if any of its characters is.
    span = np.searchsorted(spans[:, 1], first, side="right")
    inside = span < len(spans)
    inside &= spans[np.minimum(span, len(spans) - 1), 0] < end
    inside[:1] = False  # nothing comes before it to predict it from
    return np.concatenate(ids), inside


def encode_chats(
    texts: Iterable[str],
    encoder: ChatEncoder,
    folder: Path,
    split: str,
    vocab_size: int,
    progress: Callable[[int], None],
) -> tuple[int, int]:
    """Write the conversations of a split and return the number of tokens and of targets.

    Args:
        texts: as `conversation_text` writes them.
        encoder: of the conversations.
        folder: where the shards go.
        split: name of the split.
        vocab_size: tokens of the tokenizer.
        progress: called with the bytes of text done.

    Raises:
        DataError: for a conversation that the template does not take.
        OSError: if the disk is full or read-only.
    """
    done = targets = 0
    with (
        TokenWriter(folder, split, token_dtype(vocab_size)) as tokens,
        TokenWriter(folder, f"targets-{split}", FLAG) as flags,
        TokenWriter(folder, f"index-{split}", NUMBER) as index,
    ):
        for batch in _batches(texts):
            for text, (ids, inside) in zip(batch, encoder.encode(batch), strict=True):
                if not inside.any():
                    raise DataError(
                        f"no token of {text[:80]!r}... is a target; leave the conversation out, or use a tokenizer that has tokens for the assistant's words"
                    )
                tokens.write(ids)
                flags.write(inside)
                index.write(np.array([len(ids), inside.argmax()]))
                targets += int(inside.sum())
                done += len(text.encode("utf-8"))
            progress(done)
    return tokens.count, targets


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
