"""Tokenizers in the files of other programs: GPT-2's, tiktoken's, sentencepiece's and nanoGPT's.

Each reader returns the tokenizer and its end of text. docs/data.md lists the files.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muonscale.errors import DataError
from muonscale.lab.files import PlainUnpickler, read_bytes, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
MERGES, VOCAB = "merges.txt", "vocab.json"

Read = tuple["Tokenizer", str]
"""A tokenizer and its end of text."""


@dataclass(frozen=True)
class Encoding:
    """What the file of ranks of an encoding of tiktoken does not say."""

    name: str
    pattern: str
    special: dict[str, int]
    """Special tokens with their ids."""


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENCODINGS = {
    50256: Encoding("r50k_base", GPT2, {END_OF_TEXT: 50256}),
    50280: Encoding("p50k_base", GPT2, {END_OF_TEXT: 50256}),
    100256: Encoding("cl100k_base", CL100K, {END_OF_TEXT: 100257}),
    199998: Encoding("o200k_base", O200K, {END_OF_TEXT: 199999}),
}
"""tiktoken's encodings (its openai_public.py) by the number of ranks in their files."""


def read_tokenizer(path: Path) -> Read | None:
    """Return the tokenizer in a file, None if it is none of these.

    Raises:
        DataError: if the file cannot be used.
    """
    read = _gpt2 if path.name in (VOCAB, MERGES) else READERS.get(path.suffix)
    if read is None:
        return None
    try:
        return read(path)
    except DataError:
        raise
    except Exception as error:  # tokenizers raises plain Exception, a pickle anything
        raise DataError(f"tokenizer {path} cannot be loaded: {error}") from error


def _gpt2(path: Path) -> Read:
    """Read vocab.json and merges.txt, with the end of text of GPT-2."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = json.loads(read_text(path.with_name(VOCAB)))
    lines = read_text(path.with_name(MERGES)).splitlines()
    merges: Any = [
        tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")
    ]
    if END_OF_TEXT not in vocab:
        raise DataError(
            f"{path.with_name(VOCAB)} has no {END_OF_TEXT}; give a folder with the "
            "tokenizer_config.json of this tokenizer"
        )
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer, END_OF_TEXT


def _tiktoken(path: Path) -> Read:
    """Read a file of ranks: a token in base64 and its rank on every line."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    lines = (line.split() for line in read_text(path).splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    encoding = ENCODINGS.get(len(ranks))
    if encoding is None:
        known = ", ".join(f"{each.name} ({size:,})" for size, each in ENCODINGS.items())
        raise DataError(
            f"{path} has {len(ranks):,} ranks and does not say how text is divided; accepted: "
            f"{known}; give another as a tokenizer.json"
        )

    class Converter(TikTokenConverter):
        load_tiktoken_bpe = staticmethod(lambda tiktoken_url: ranks)

    tokenizer = Converter(str(path), pattern=encoding.pattern).converted()
    _add_special(tokenizer, encoding.special)
    return tokenizer, END_OF_TEXT


def _add_special(tokenizer: Tokenizer, special: dict[str, int]) -> None:
    """Add special tokens at ids of their own; ids between are filled with unused tokens."""
    from tokenizers import AddedToken

    for token, number in sorted(special.items(), key=lambda item: item[1]):
        known = set(tokenizer.get_vocab().values())
        unused = (i for i in range(number) if i not in known)
        names = [f"<|unused_{i}|>" for i in unused]
        tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (*names, token)])
        if tokenizer.token_to_id(token) != number:
            raise ValueError(f"{token} has the id {tokenizer.token_to_id(token)} and not {number}")


def _sentencepiece(path: Path) -> Read:
    from transformers.convert_slow_tokenizer import SpmConverter, import_protobuf

    build: Any = getattr(SpmConverter, "build_tokenizer_from_spm_proto", None)
    try:
        messages: Any = import_protobuf()
    except ImportError as error:
        raise DataError(f"{path}: a sentencepiece model needs the package protobuf") from error
    if build is None:
        raise DataError(f"{path}: a sentencepiece model needs transformers 5.24 or newer")
    proto = messages.ModelProto()
    proto.ParseFromString(read_bytes(path))
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    is_unigram = proto.trainer_spec.model_type == 1
    vocab = pieces if is_unigram else {name: number for number, (name, _) in enumerate(pieces)}
    tokenizer = build(proto, vocab)
    if tokenizer is None or not pieces:
        raise DataError(f"{path} is no sentencepiece model of unigrams or byte pairs")
    from tokenizers import AddedToken

    control = [piece.piece for piece in proto.pieces if piece.type == 3]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in control])
    end = proto.trainer_spec.eos_piece
    if end not in control:
        raise DataError(f"{path} has no end of text")
    return tokenizer, end


def _characters(path: Path) -> Read:
    """Read the meta.pkl of nanoGPT: a vocabulary of characters; an end of text is added."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    try:
        numbers = PlainUnpickler(io.BytesIO(read_bytes(path))).load()["stoi"]
        tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=""))
    except (LookupError, TypeError) as error:
        raise DataError(f"{path} has no vocabulary of characters under 'stoi'") from error
    pre_tokenizer: Any = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer, END_OF_TEXT


READERS: dict[str, Callable[[Path], Read]] = {
    ".tiktoken": _tiktoken,
    ".model": _sentencepiece,
    ".pkl": _characters,
}
"""The reader of each suffix."""
