"""What can be done if a step needs more memory than there is."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from muonscale.errors import MuonscaleError, first_line
from muonscale.lab.config.load import Config


@contextmanager
def explain_out_of_memory(config: Config) -> Generator[None]:
    """Say which keys lower the memory of a step if there is not enough inside the block.

    Raises:
        MuonscaleError: in place of the error of torch's allocator.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MuonscaleError(
            f"out of memory in training: {first_line(error)}. A step needs less with "
            f"{', '.join(_ways(config))}. muonscale plan estimates the memory of each"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be allocated."""
    kinds = MemoryError, torch.OutOfMemoryError
    return isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _ways(config: Config) -> list[str]:
    train, sequence = config.train, config.data.sequence_length
    micro = train.micro_batch_tokens or train.batch_tokens
    ways = []
    if micro > sequence:
        ways.append(f"train.micro_batch_tokens below {micro:,} (at least {sequence:,})")
    if not train.activation_checkpointing:
        ways.append("train.activation_checkpointing=true")
    ways.append(f"data.sequence_length below {sequence:,}")
    return [*ways, "more processes under parallel.data=fsdp", "a smaller model"]
