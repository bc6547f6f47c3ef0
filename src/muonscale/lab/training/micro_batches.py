"""How the batch of a step is divided: among the ranks, and on a rank into micro-batches."""

from __future__ import annotations

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config
from muonscale.lab.parallel.topology import Topology


def micro_batch_size(config: Config, share: int, *, at_least_two: bool = False) -> int:
    """Return how many sequences a rank takes through the model at a time.

    The size is `train.micro_batch_tokens`, or the whole share of the batch if that is not set.

    Args:
        config: the configuration of the run.
        share: sequences of the batch on one rank, at least 2 for `at_least_two`.
        at_least_two: divide a share that would be one micro-batch into the fewest equal ones.
    """
    tokens = config.train.micro_batch_tokens
    size = share if tokens is None else tokens // config.data.sequence_length
    if at_least_two and size >= share:
        return next(size for size in range(share // 2, 0, -1) if share % size == 0)
    return size


def check_shares(config: Config, topology: Topology) -> None:
    """Check that the ranks can share every batch of the run.

    Raises:
        ConfigError: naming the batch, the micro-batch or the sequence that cannot be divided.
    """
    length, ranks = config.data.sequence_length, topology.data_ranks
    micro = config.train.micro_batch_tokens
    for phase in config.timeline.phases:
        batch = phase.batch * length
        if phase.batch % ranks:
            raise ConfigError(
                f"train.batch_tokens={batch} is {phase.batch} sequences of {length}, which {ranks} "
                f"data-parallel ranks cannot share evenly; accepted: multiples of {ranks * length}"
            )
        if micro is not None and batch // ranks % micro:
            raise ConfigError(
                f"train.micro_batch_tokens={micro} does not divide the {batch // ranks} tokens "
                f"that each of {ranks} data-parallel ranks has of train.batch_tokens={batch}"
            )
    if topology.sequence and length % topology.tensor:
        raise ConfigError(
            f"data.sequence_length={length} is not a multiple of "
            f"parallel.tensor={topology.tensor}, which sequence parallelism requires"
        )
