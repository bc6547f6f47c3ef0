"""The tokenizer of a run: a byte-level BPE trained on the corpus, or an existing one.

Both are a `PreTrainedTokenizerFast`. The end-of-text token separates documents and begins a text.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from muonscale.errors import DataError, first_line
from muonscale.lab.data.folders import file_states
from muonscale.lab.data.tokenizer_files import END_OF_TEXT, MERGES, VOCAB, read_tokenizer
from muonscale.lab.files import check_folder, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

BROKEN = (errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)
"""Errors of a file system and not of a file."""
UNUSED_IDS = 2**20
"""Most ids without a token in a vocabulary."""

# The end of text in published tokenizers, for a tokenizer.json without a config.
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>", "[EOS]")
KEPT_TOKENS = ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
ACCEPTED = (
    "data.tokenizer accepts a tokenizer.json, vocab.json with merges.txt, a .tiktoken or "
    "sentencepiece .model file, a folder that holds one, or a Hugging Face name; without it a "
    "tokenizer is trained on the corpus"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: the sample to train on, in pieces. Measured: 25 MB take 11 s on two cores, and
            memory grows to some 60 times the size of the sample.
        vocab_size: tokens, the end of text (id 0) and the 256 bytes among them.

    Returns:
        A tokenizer that decodes every encoded text to itself. Its length is below `vocab_size`
        where no further pair of tokens occurs twice in the sample.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, END_OF_TEXT, {})


def load_tokenizer(name: str, *, own_begin: bool = False) -> PreTrainedTokenizerFast:
    """Load the tokenizer `data.tokenizer` names.

    Args:
        name: a file of a tokenizer, a folder with one, or a Hugging Face name.
        own_begin: keep its own token for the beginning of a text, which chat templates write.

    Raises:
        DataError: if there is none, it cannot be loaded, or it has no end-of-text token.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        source = path / "tokenizer.json"
        if not source.is_file() and (file := _only_file(path)) is not None:
            return _load_file(file)
        return _load_pretrained(str(path), with_file=source.is_file(), own_begin=own_begin)
    if path.exists():
        return _load_file(path)
    if path.suffix == ".json" or name[0] in "./~" or name.count("/") > 1:
        raise DataError(f"tokenizer {name} does not exist; {ACCEPTED}")
    return _load_pretrained(name, with_file=False, own_begin=own_begin)


def _only_file(folder: Path) -> Path | None:
    """Return the file of a folder that holds a tokenizer without a Hugging Face configuration."""
    if any((folder / name).exists() for name in ("tokenizer_config.json", "config.json")):
        return None
    if (folder / VOCAB).is_file() and (folder / MERGES).is_file():
        return folder / VOCAB
    found = sorted([*folder.glob("*.tiktoken"), *folder.glob("*.model")])
    return found[0] if len(found) == 1 else None


def tokenizer_identity(name: str | None) -> Any:
    """Return what identifies `data.tokenizer`, as JSON values, without loading it."""
    path = Path(name or "").expanduser()
    known = name is not None and path.exists()
    if not known:
        return name
    if path.name in (VOCAB, MERGES):
        path = path.parent
    return [str(path.resolve()), file_states(path, "data.tokenizer")]


def open_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer that `save_pretrained` wrote.

    Raises:
        DataError: if the folder does not hold one.
    """
    return _load_pretrained(str(folder), with_file=True, own_begin=True)


def _load_file(path: Path) -> PreTrainedTokenizerFast:
    backend, end = read_tokenizer(path) or (_read_backend(path), None)
    end = end or _known_end(backend)
    if end is None:
        raise DataError(
            f"tokenizer {path} has none of the end-of-text tokens {', '.join(KNOWN_ENDS)}; give "
            "the folder with its tokenizer_config.json"
        )
    _check_ids(backend, str(path))
    try:
        return _wrap(backend, end, {})
    except Exception as error:  # as in _load_pretrained
        raise DataError(f"tokenizer {path} cannot be used: {error}. {ACCEPTED}") from error


def _known_end(backend: Tokenizer) -> str | None:
    return next((token for token in KNOWN_ENDS if backend.token_to_id(token) is not None), None)


def _read_backend(path: Path) -> Tokenizer:
    """Read a tokenizer.json, without the copy that transformers makes of it."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(read_text(path))
    except Exception as error:  # tokenizers raises plain Exception
        _refuse_broken(str(path), error)
        raise DataError(f"tokenizer {path} cannot be loaded: {error}. {ACCEPTED}") from error


def _load_pretrained(name: str, *, with_file: bool, own_begin: bool) -> PreTrainedTokenizerFast:
    import transformers

    loader = transformers.PreTrainedTokenizerFast if with_file else transformers.AutoTokenizer
    source = Path(name) / "tokenizer.json"
    try:
        if Path(name).is_dir():
            check_folder(Path(name))
        if with_file and source.is_file():
            _check_ids(_read_backend(source), name)  # before transformers makes a copy
        loaded: Any = loader.from_pretrained(name, trust_remote_code=False)
    except DataError:
        raise
    except Exception as error:  # network, missing files, unknown classes have no common base
        _refuse_broken(name, error)
        raise DataError(
            f"tokenizer {name} cannot be loaded: {first_line(error).rstrip('.')}. {ACCEPTED}"
        ) from error
    if getattr(loaded, "backend_tokenizer", None) is None:
        kind = type(loaded).__name__
        raise DataError(f"tokenizer {name} is a {kind} without a tokenizer.json. {ACCEPTED}")
    backend = loaded.backend_tokenizer
    end = loaded.eos_token or _known_end(backend)
    if end is None:
        raise DataError(
            f"tokenizer {name} has no end-of-text token: its tokenizer_config.json names no "
            f"eos_token, and its vocabulary has none of {', '.join(KNOWN_ENDS)}"
        )
    _check_ids(backend, name)
    own = ("bos_token",) if own_begin else ()
    kept = {key: getattr(loaded, key, None) for key in (*KEPT_TOKENS, *own, "chat_template")}
    try:
        return _wrap(backend, str(end), {key: value for key, value in kept.items() if value})
    except Exception as error:  # this makes a copy, which fails for some tokenizers
        raise DataError(f"tokenizer {name} cannot be used: {error}. {ACCEPTED}") from error


def _refuse_broken(name: str, error: Exception) -> None:
    """Raise DataError if the disk or its permissions failed, where another tokenizer is no help."""
    if isinstance(error, OSError) and error.errno in BROKEN:
        raise DataError(
            f"tokenizer {name} cannot be read: {error}; remove the cause and repeat the command"
        ) from error


def _wrap(backend: Tokenizer, end: str, extra: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return a tokenizer that does not truncate, pad or clean up text.

    A text begins with `end`, unless `extra` has another `bos_token`.
    """
    from transformers import PreTrainedTokenizerFast

    backend.no_truncation()
    backend.no_padding()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        clean_up_tokenization_spaces=False,
        **{"bos_token": end, **extra},
    )


def id_limit(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the number above every id of a tokenizer: more than its tokens if ids are unused."""
    return max(tokenizer.get_vocab().values()) + 1


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.int64]:
    """Return the bytes of text of every id, int64 `[id_limit]`; special tokens have none."""
    backend = tokenizer.backend_tokenizer
    sizes = np.zeros(id_limit(tokenizer), dtype=np.int64)
    is_bytes = "ByteLevel" in repr(backend.decoder)  # one character for each byte
    added = backend.get_added_tokens_decoder()
    for token, number in backend.get_vocab(with_added_tokens=True).items():
        if number in added:
            sizes[number] = 0 if added[number].special else len(token.encode())
        elif is_bytes:
            sizes[number] = len(token)
        elif len(token) == 6 and token.startswith("<0x"):  # a byte of sentencepiece
            sizes[number] = 1
        else:
            sizes[number] = len(token.replace("\u2581", " ").encode())
    return sizes


def _check_ids(backend: Tokenizer, name: str) -> None:
    """Refuse very large ids: a copy of the tokenizer needs memory for each id up to the largest."""
    ids = backend.get_vocab(with_added_tokens=True).values()
    if ids and max(ids) >= len(ids) + UNUSED_IDS:
        raise DataError(
            f"tokenizer {name} cannot be used: its largest id is {max(ids):,} and it has "
            f"{len(ids):,} tokens; at most {UNUSED_IDS:,} ids may be unused"
        )
