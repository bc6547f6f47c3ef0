"""Checkpoints from and to the Hugging Face Hub, and whether their model card mentions Muon."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from muonscale.errors import CheckpointError, ConfigError, first_line
from muonscale.lab.files import check_local, read_text

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
        ConfigError: for a URL.
    """
    check_local(name, "checkpoint")
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
        raise CheckpointError(
            f"there is no folder {name}, and no checkpoint of that name could be downloaded: "
            f"{first_line(error)}"
        ) from error


def fitting_length(folder: Path, most: int = 1024) -> int:
    """Return the largest power of two, up to `most`, that a checkpoint has positions for."""
    try:
        positions = json.loads(read_text(folder / "config.json")).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError):  # loading the model says what is wrong
        return most
    length = most
    while isinstance(positions, int) and length > max(positions, 2):
        length //= 2
    return length


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


def check_upload(name: str) -> None:
    """Check that a folder can be uploaded under a name, before it is written.

    Raises:
        ConfigError: for what is no name of a repository, and if the Hub must not be asked or knows
            no user.
    """
    from huggingface_hub import constants, get_token

    if not NAME.fullmatch(name):
        raise ConfigError(f"--push {name} is no repository of the Hub; accepted: user/model")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"--push {name}: HF_HUB_OFFLINE is set; unset it, or leave out --push")
    if get_token() is None:
        raise ConfigError(f"--push {name} needs a user of the Hub; log in with: hf auth login")


def upload(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Upload a model folder to a repository of the Hub, created if necessary, and return its URL.

    Raises:
        CheckpointError: if the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=name, commit_message=message)
    except Exception as error:  # network, permissions: no common base
        raise CheckpointError(
            f"{folder} is complete, and could not be uploaded to {name}: {first_line(error)}; "
            f"upload it with: hf upload {name} {folder}"
        ) from error
    return str(url)
