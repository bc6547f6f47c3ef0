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
from muonscale.lab.data.encode import batches
from muonscale.lab.data.tokens import TokenWriter, token_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Text that is tokenized at once, on all cores.
BATCH_BYTES = 1 << 20

Encoded = tuple[NDArray[np.int64], NDArray[np.bool_]]


class ChatEncoder:
    """Converts conversations to tokens and targets.

    Special tokens that the template writes become tokens; those that a message spells out stay
    text.

    Args:
        tokenizer: the tokenizer, which is not changed.
        template: the chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> None:
        from tokenizers import Tokenizer, processors

        self._template = template
        self._escape = Escape(template.ends)
        copy = tokenizer.backend_tokenizer.to_str()
        self._tokens, self._plain = Tokenizer.from_str(copy), Tokenizer.from_str(copy)
        for backend in (self._tokens, self._plain):
            # The tokenizer's own may leave spaces out of the offsets of tokens.
            backend.post_processor = processors.Sequence([])  # pyrefly: ignore
        self._tokens.encode_special_tokens = False
        self._plain.encode_special_tokens = True

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Return token ids, int64 `[tokens]`, and which of them are targets, of every conversation.

        Args:
            texts: conversations in the form of `conversation_text`.

        Raises:
            DataError: for a conversation that the template refuses.
        """
        parts = []
        for text in texts:
            conversation, hidden = self._escape.hide(read_conversation(text))
            rendered = self._template.render(*conversation)
            parts.append((rendered, list(_cut(rendered.text, hidden))))
        encodings = {}
        for hidden, backend in ((False, self._tokens), (True, self._plain)):
            pieces = [text for _, cut in parts for _, text, spelled in cut if spelled == hidden]
            encodings[hidden] = iter(backend.encode_batch(pieces, add_special_tokens=False))
        return [
            _join(rendered, [(piece, next(encodings[piece[2]])) for piece in cut])
            for rendered, cut in parts
        ]


RenderedPiece = tuple[int, str, bool]
"""Position in the rendered text, the text to tokenize, and whether it was hidden."""


def _cut(text: str, hidden: dict[str, str]) -> Iterator[RenderedPiece]:
    """Yield the hidden spellings of a text and the parts between them."""
    at = 0
    for part in re.split(f"([{''.join(hidden)}])", text) if hidden else [text]:
        yield at, hidden.get(part, part), part in hidden
        at += len(part)


def _join(rendered: Rendered, parts: list[tuple[RenderedPiece, Any]]) -> Encoded:
    ids, places = [], []
    for (start, _, spelled), encoding in parts:
        ids.append(np.array(encoding.ids, dtype=np.int64))
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        places.append(start + np.array([[0, 1]] * len(offsets)) if spelled else start + offsets)
    first, end = np.concatenate(places).T
    spans = np.array(rendered.spans)
    # A token belongs to a turn if any of its characters does.
    span = np.searchsorted(spans[:, 1], first, side="right")
    inside = span < len(spans)
    inside &= spans[np.minimum(span, len(spans) - 1), 0] < end
    inside[:1] = False  # no token before it predicts it
    return np.concatenate(ids), inside


def encode_chats(
    texts: Iterable[str],
    encoder: ChatEncoder,
    folder: Path,
    split: str,
    id_limit: int,
    progress: Callable[[int], None],
) -> tuple[int, int]:
    """Write the conversations of a split and return the number of tokens and of targets.

    Args:
        texts: conversations in the form of `conversation_text`.
        encoder: the encoder of the conversations.
        folder: where the shards go.
        split: name of the split.
        id_limit: number above every id of a token.
        progress: called with the bytes of text done.

    Raises:
        DataError: for a conversation that the template refuses, or that has no target.
        OSError: if the disk is full or read-only.
    """
    done = targets = 0
    with (
        TokenWriter(folder, split, token_dtype(id_limit)) as tokens,
        TokenWriter(folder, f"targets-{split}", FLAG) as flags,
        TokenWriter(folder, f"index-{split}", NUMBER) as index,
    ):
        for batch in batches(texts, len, BATCH_BYTES):
            for text, (ids, inside) in zip(batch, encoder.encode(batch), strict=True):
                if not inside.any():
                    raise DataError(
                        f"no token of {text[:80]!r}... is a target; remove the conversation, or "
                        "use a tokenizer with tokens for the assistant's words"
                    )
                tokens.write(ids)
                flags.write(inside)
                index.write(np.array([len(ids), inside.argmax()]))
                targets += int(inside.sum())
                done += len(text.encode("utf-8"))
            progress(done)
    return tokens.count, targets
