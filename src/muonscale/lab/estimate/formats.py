"""Which files a picture can be written to; apart from it, so that asking loads no matplotlib."""

from __future__ import annotations

from pathlib import Path

from muonscale.errors import ConfigError

FORMATS = (".png", ".svg")


def check_format(path: Path) -> None:
    """Raise ConfigError for a file that is not one of `FORMATS`, or has no folder."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"--figure {path}: accepted are files that end in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ConfigError(
            f"--figure {path}: there is no folder {path.parent}; make it, or choose another"
        )
