"""Text to tokens, in parallel batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from muonscale.lab.data.document_store import TextPiece
from muonscale.lab.data.tokenizer import id_limit
from muonscale.lab.data.tokens import TokenWriter, token_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Text that is tokenized at once, on all cores. The results take some 50 times as much memory.
BATCH_BYTES = 1 << 22

ItemT = TypeVar("ItemT")


def encode_split(
    pieces: Iterable[TextPiece],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    split: str,
    progress: Callable[[int], None],
) -> int:
    """Write the tokens of a split's text, with an end of text before every document.

    Special tokens that a text spells out stay text.

    Args:
        pieces: the text; a document begins at each `first` piece.
        tokenizer: it is changed, and no longer finds special tokens.
        folder: where the shards go.
        split: start of their names.
        progress: called with the bytes of text done.

    Returns:
        The number of tokens.

    Raises:
        OSError: if the disk is full or read-only.
    """
    tokenizer.backend_tokenizer.encode_special_tokens = True
    done = 0
    with TokenWriter(folder, split, token_dtype(id_limit(tokenizer))) as writer:
        for batch in batches(pieces, lambda piece: piece.size, BATCH_BYTES):
            writer.write(_encode(batch, tokenizer))
            done += sum(piece.size for piece in batch)
            progress(done)
    return writer.count


def batches(
    items: Iterable[ItemT], size_of: Callable[[ItemT], int], limit: int
) -> Iterator[list[ItemT]]:
    """Yield lists of items whose sizes sum to `limit` or a little more."""
    batch: list[ItemT] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[TextPiece], tokenizer: PreTrainedTokenizerFast) -> NDArray[np.int64]:
    texts = [piece.text for piece in batch]
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    end = np.array([tokenizer.eos_token_id], dtype=np.int64)
    parts = []
    for piece, encoding in zip(batch, encodings, strict=True):
        if piece.first:
            parts.append(end)
        parts.append(np.array(encoding.ids, dtype=np.int64))
    return np.concatenate(parts)
