"""Checkpoints from the Hugging Face Hub, and whether their model card mentions Muon."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from muonscale.errors import CheckpointError

NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]
"""Patterns of configuration, weights, tokenizer and model card."""
IGNORED = ["*/*", "consolidated*.safetensors"]
"""Patterns of copies of the weights in another project's format."""

MUON_GAINS_NOTHING = (
    "the model card does not say that this checkpoint was trained with Muon. Models pretrained "
    "with AdamW gained nothing from fine-tuning with Muon (Moonlight, arXiv 2502.16982, section "
    "3.5, tables 6 and 7); optimizer.rule=adamw trains with AdamW"
)


def checkpoint_folder(name: str) -> Path:
    """Return the folder of a checkpoint, downloading it if `name` is not a folder but on the Hub.

    Raises:
        CheckpointError: if there is no such folder and it cannot be downloaded.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not NAME.fullmatch(name):
        raise CheckpointError(
            f"{name} is not a folder; accepted: a Hugging Face checkpoint folder, or a name such "
            "as org/model"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns=IGNORED))
    except Exception as error:  # network, permissions, unknown names, a full disk: no common base
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise CheckpointError(
            f"there is no folder {name}, and no checkpoint of that name could be downloaded: "
            f"{reason}"
        ) from error


def trained_with_muon(folder: Path) -> bool:
    """Return whether a checkpoint's model card (README.md) has the tag `muon`."""
    from huggingface_hub import metadata_load

    try:
        card: Any = metadata_load(folder / "README.md") or {}
    except Exception:  # the card is missing or unreadable
        return False
    tags = card.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    return any(str(tag).lower() == "muon" for tag in tags)
