"""The GPUs of this machine, found without torch, whose import takes seconds."""

from __future__ import annotations

import os
import re
from itertools import takewhile
from pathlib import Path

DEVICES = Path("/dev")


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them.

    If the variable is not set, they are counted by the device files of NVIDIA's driver; GPUs of
    other vendors are only known by the variable.
    """
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in named.split(",")]
        return list(takewhile(lambda name: name not in ("", "-1"), names))
    files = [path for path in DEVICES.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return [str(number) for number in range(len(files))]
