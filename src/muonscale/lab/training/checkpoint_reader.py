"""Read the files of torch.distributed.checkpoint without running code from them.

torch unpickles the file `.metadata` and every value that is not a tensor, and a pickle can call any
function: a checkpoint of another person could run code. `CheckpointReader` builds only the classes
in `ALLOWED`; `CheckpointPlanner` reads values as `torch.load` does with `weights_only=True`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem

from muonscale.lab.files import PlainUnpickler, check_regular, read_bytes

TENSORS = ".metadata"
"""File in which torch.distributed.checkpoint records which file contains which tensor."""

MOST_BYTES = 2**30
"""Largest `.metadata`; each tensor on each rank needs about 100 bytes."""


def _strided(name: str) -> torch.layout:
    """Return the layout of a dense tensor, the only one of parameters and their state."""
    if name != str(torch.strided):
        raise pickle.UnpicklingError(f"the layout of a tensor is {name}, not {torch.strided}")
    return torch.strided


_METADATA, _PATHS = dcp.__name__, ("pathlib", "pathlib._local")

ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    **{(_METADATA, name): getattr(dcp, name) for name in dcp.__all__},
    (_METADATA, "_MEM_FORMAT_ENCODING"): dcp._MEM_FORMAT_ENCODING,
    (_StorageInfo.__module__, "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _strided,
    # The folder that the checkpoint was written to; it is not used.
    **{(module, "PosixPath"): PurePosixPath for module in _PATHS},
    **{(module, "WindowsPath"): PureWindowsPath for module in _PATHS},
}
"""What a `.metadata` may build, by module and name; dtypes of torch in addition."""


class _MetadataUnpickler(PlainUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (known := ALLOWED.get((module, name))) is not None:
            return known
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which no checkpoint needs and which could run code"
        )


def read_metadata(folder: Path) -> dcp.Metadata:
    """Return the metadata of a checkpoint.

    Raises:
        OSError: if the file cannot be read.
        pickle.UnpicklingError: if it holds anything but the metadata of a checkpoint whose files
            are in this folder.
    """
    content = read_bytes(folder / TENSORS, MOST_BYTES)
    try:
        found = _MetadataUnpickler(BytesIO(content)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle raises errors of any class
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
    tables = [getattr(found, name, None) for name in ("state_dict_metadata", "storage_data")]
    if not isinstance(found, dcp.Metadata) or not all(isinstance(t, dict) for t in tables):
        raise pickle.UnpicklingError("it holds no metadata of a checkpoint")
    for entry in (found.storage_data or {}).values():
        name = getattr(entry, "relative_path", None)
        if not isinstance(name, str) or Path(name).name != name:
            raise pickle.UnpicklingError(f"it names {name!r}, which is no file of the checkpoint")
    return found


class CheckpointReader(FileSystemReader):
    """torch's reader of a checkpoint folder; it runs no code and opens only regular files.

    Raises:
        OSError: if a file cannot be read.
        pickle.UnpicklingError: as `read_metadata`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # Read here: torch prints a traceback of an error, and looks for other metadata after it.
        self._found = read_metadata(folder)
        for name in {entry.relative_path for entry in self._found.storage_data.values()}:
            check_regular(folder / name)

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        """Return the metadata of the folder."""
        found = self._found
        if not isinstance(found.storage_meta, dcp.StorageMeta):
            found.storage_meta = dcp.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class CheckpointPlanner(DefaultLoadPlanner):
    """torch's planner of a load; values that are not tensors run no code."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """Put a value into the state dict."""
        trusted = BytesIO()
        torch.save(torch.load(value, weights_only=True), trusted)
        trusted.seek(0)
        super().load_bytes(read_item, trusted)
