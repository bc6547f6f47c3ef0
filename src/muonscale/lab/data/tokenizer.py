"""The tokenizer of a run: a byte-level BPE trained on the corpus, or one that exists.

Either way the result is a `PreTrainedTokenizerFast` whose end-of-text token separates documents
and also begins a text.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muonscale.errors import DataError
from muonscale.lab.data.sources import file_states

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
UNUSED_IDS = 2**20
"""Ids without a token that a vocabulary may have."""

# What published tokenizers call their end of text, for a tokenizer.json that comes without a config.
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>", "[EOS]")
KEPT_TOKENS = ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
ACCEPTED = (
    "data.tokenizer takes a tokenizer.json file, a folder that holds one, or a Hugging Face name; "
    "without it a tokenizer is trained on the corpus"
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
        name: a tokenizer.json file, a folder with one, or a Hugging Face name.
        own_begin: keep its own beginning of text, which chat templates write, where it has one.

    Raises:
        DataError: if there is none, it cannot be loaded, or it has no end-of-text token.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        source = path / "tokenizer.json"
        return _load_pretrained(str(path), with_file=source.is_file(), own_begin=own_begin)
    if path.exists():
        return _load_file(path)
    if path.suffix == ".json" or name[0] in "./~" or name.count("/") > 1:
        raise DataError(f"tokenizer {name} does not exist; {ACCEPTED}")
    return _load_pretrained(name, with_file=False, own_begin=own_begin)


def tokenizer_identity(name: str | None) -> Any:
    """Return what tells `data.tokenizer` from others without loading it, as JSON values."""
    path = Path(name or "").expanduser()
    known = name is not None and path.exists()
    return [str(path.resolve()), file_states(path)] if known else name


def open_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer that `save_pretrained` wrote.

    Raises:
        DataError: if the folder does not hold one.
    """
    return _load_pretrained(str(folder), with_file=True, own_begin=True)


def _load_file(path: Path) -> PreTrainedTokenizerFast:
    backend = _backend(path)
    end = next((token for token in KNOWN_ENDS if backend.token_to_id(token) is not None), None)
    if end is None:
        raise DataError(
            f"tokenizer {path} has no end-of-text token; a tokenizer.json alone must have one of "
            f"{', '.join(KNOWN_ENDS)}; for another, give the folder with tokenizer_config.json"
        )
    try:
        return _wrap(backend, end, {})
    except Exception as error:  # as in _load_pretrained
        raise DataError(f"tokenizer {path} cannot be used: {error}. {ACCEPTED}") from error


def _backend(path: Path) -> Tokenizer:
    """Read a tokenizer.json, without the copy that transformers makes of it."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise DataError(f"tokenizer {path} cannot be loaded: {error}. {ACCEPTED}") from error


def _load_pretrained(name: str, *, with_file: bool, own_begin: bool) -> PreTrainedTokenizerFast:
    import transformers

    loader = transformers.PreTrainedTokenizerFast if with_file else transformers.AutoTokenizer
    source = Path(name) / "tokenizer.json"
    try:
        if with_file and source.is_file():
            _check_ids(_backend(source))  # before transformers makes a copy
        loaded: Any = loader.from_pretrained(name)
    except Exception as error:  # network, missing files, unknown classes: no common base
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise DataError(f"tokenizer {name} cannot be loaded: {reason} {ACCEPTED}") from error
    if getattr(loaded, "backend_tokenizer", None) is None:
        kind = type(loaded).__name__
        raise DataError(f"tokenizer {name} is a {kind} without a tokenizer.json. {ACCEPTED}")
    backend = loaded.backend_tokenizer
    end = loaded.eos_token
    if end is None:
        end = next((token for token in KNOWN_ENDS if backend.token_to_id(token) is not None), None)
    if end is None:
        raise DataError(
            f"tokenizer {name} has no end-of-text token, which separates documents; its "
            f"tokenizer_config.json must name an eos_token, or its vocabulary hold one of "
            f"{', '.join(KNOWN_ENDS)}"
        )
    own = ("bos_token",) if own_begin else ()
    kept = {key: getattr(loaded, key, None) for key in (*KEPT_TOKENS, *own, "chat_template")}
    try:
        return _wrap(backend, str(end), {key: value for key, value in kept.items() if value})
    except Exception as error:  # a copy is made, and a tokenizer that loads may not copy
        raise DataError(f"tokenizer {name} cannot be used: {error}. {ACCEPTED}") from error


def _wrap(backend: Tokenizer, end: str, extra: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return a tokenizer that never cuts, pads or tidies text.

    Its texts begin with `end`, unless `extra` has another `bos_token`.
    """
    from transformers import PreTrainedTokenizerFast

    _check_ids(backend)
    backend.no_truncation()
    backend.no_padding()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        clean_up_tokenization_spaces=False,
        **{"bos_token": end, **extra},
    )


def _check_ids(backend: Tokenizer) -> None:
    """Refuse ids so large that a copy of the tokenizer, which has a place for each, fills the memory."""
    ids = backend.get_vocab(with_added_tokens=True).values()
    if ids and max(ids) >= len(ids) + UNUSED_IDS:
        raise DataError(
            f"its largest id is {max(ids):,} and its tokens are {len(ids):,}; accepted are at most "
            f"{UNUSED_IDS:,} unused ids"
        )
