"""What `muonscale eval` is to do: the overrides of a run, or of a model folder, as a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config, load_config, parse_override, resolve_config
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.export import tokenizer_folder
from muonscale.lab.training.provenance import use_start_folder

TEXT = ("data.source", "data.path", "data.mixture")
"""Keys that name a text."""

OTHERS = ("run.device", "run.threads", "eval.batch_tokens", "train.precision")
"""Keys beside `data.*` that an evaluation has."""

OF_OWN_DATA = ("data.cache", "data.sequence_length")
"""Keys of `data` that leave a run's held-out split what it is."""

BATCH_TOKENS = 8192
"""Tokens of a batch where its own number is no multiple of the sequence length."""

LONGEST = 4096
"""Sequence length of a model folder at most, unless one is given: the memory of logits grows with it."""


@dataclass(frozen=True)
class Settings:
    """How to evaluate."""

    config: Config
    """Its `data`, `eval`, `run` and `train.precision` are in use."""
    gives_text: bool
    """Whether a text was named."""
    names_own: bool = False
    """Whether a corpus of the run itself was named."""

    @property
    def batch_rows(self) -> int:
        """Sequences of a batch."""
        return self.config.eval.batch_tokens // self.config.data.sequence_length


def run_settings(run: RunFolder, overrides: Sequence[str]) -> Settings:
    """Return how to evaluate a run: on its own data, or on a text that the overrides name.

    Raises:
        ConfigError: for an override that an evaluation does not have, or that would change which of
            the run's data was held out.
    """
    saved = load_config(str(run.path))
    config = use_start_folder(saved, run)
    names = _check_names(overrides)
    gives_text = any(name in TEXT for name in names)
    if gives_text:
        kept = {"cache", "sequence_length", "errors", "held_out"}
        data = config.data.model_dump(mode="json", include=kept)
        data["tokenizer"] = str(tokenizer_folder(run))
    else:
        data = config.data.model_dump(mode="json")
        _check_own(names)
    sections = {
        "run": config.run.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        "eval": config.eval.model_dump(mode="json"),
        "train": {"precision": config.train.precision},
    }
    resolved = _resolved(sections, data, overrides)
    names_own = gives_text and not _places(resolved).isdisjoint(_places(saved))
    if names_own:
        _check_own([name for name in names if name not in TEXT])
    return Settings(resolved, gives_text, names_own)


def _places(config: Config) -> set[str]:
    """Return where the corpora of a configuration are."""
    return {
        part.source or str(Path(part.path or "").expanduser().resolve())
        for part in config.data.corpora
    }


def folder_settings(folder: Path, positions: int | None, overrides: Sequence[str]) -> Settings:
    """Return how to evaluate a Hugging Face folder.

    Args:
        folder: of the model and its tokenizer.
        positions: of the model, where it has a limit.
        overrides: `section.key=value`; without a text in them none is measured.

    Raises:
        ConfigError: for an override that an evaluation does not have.
    """
    names = _check_names(overrides)
    gives_text = any(name in TEXT for name in names)
    data: dict[str, Any] = {
        "tokenizer": str(folder),
        "sequence_length": min(positions or LONGEST, LONGEST),
    }
    if not gives_text:
        if given := [name for name in names if name.startswith("data.")]:
            raise ConfigError(f"{given[0]} is given, and no text: name one with {', '.join(TEXT)}")
        data["source"] = "python-stdlib"  # it has to name one, which is not read
    sections = {"run": {"path": str(folder)}, "model": {"config": str(folder)}, "train": {}}
    return Settings(_resolved(sections, data, overrides), gives_text)


def _check_names(overrides: Sequence[str]) -> list[str]:
    names = [text.partition("=")[0] for text in overrides]
    for name in names:
        if name in ("data.tokenizer", "data.vocab_size"):
            raise ConfigError(
                f"{name} is given: a model is evaluated with its own tokenizer; leave it out"
            )
        if not name.startswith("data.") and name not in OTHERS:
            raise ConfigError(
                f"an evaluation has no {name}; accepted: data.* and {', '.join(OTHERS)}"
            )
    return names


def _check_own(names: list[str]) -> None:
    for name in names:
        if name.startswith("data.") and name not in OF_OWN_DATA:
            raise ConfigError(
                f"{name} would change which of the run's data was held out; accepted are "
                f"{', '.join(OF_OWN_DATA)}, or another text with {', '.join(TEXT)}"
            )


def _resolved(sections: dict[str, Any], data: dict[str, Any], overrides: Sequence[str]) -> Config:
    """Return the configuration, with batches that are whole sequences of the length that is given."""
    given = {name: value for name, _, value in (text.partition("=") for text in overrides)}
    length = data["sequence_length"]
    if "data.sequence_length" in given:
        _, length = parse_override(f"data.sequence_length={given['data.sequence_length']}")
    evaluation, train = sections.get("eval", {}), {**sections["train"], "steps": 1}
    if isinstance(length, int) and length > 1:  # else it is refused by its own name
        train["batch_tokens"] = length
        if evaluation.get("batch_tokens", BATCH_TOKENS) % length:
            evaluation["batch_tokens"] = max(1, BATCH_TOKENS // length) * length
    tree = {**sections, "data": data, "train": train, "eval": evaluation}
    return resolve_config(tree, overrides)
