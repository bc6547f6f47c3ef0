"""The batches of a run: functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from muonscale.lab.config.load import Config
from muonscale.lab.config.run_length import Timeline
from muonscale.lab.data.mixture import Stretch, locate, plan_mixture, read_in_all
from muonscale.lab.data.prepare import Corpus
from muonscale.lab.data.shuffle import indices_at, sequence_indices
from muonscale.lab.data.stream import StreamedSequences
from muonscale.lab.data.tokens import Rows
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.text_loss import batches_of, weighted_mean
from muonscale.lab.training.schedule import spans

CHUNK = 256
"""Sequences read at a time when a whole split is read."""


@dataclass(frozen=True)
class Batches:
    """The batches of a run. A batch is int64 [batch, length + 1], with a loss mask for chats.

    The ranks share every training batch; each reads a contiguous part of it.
    """

    train: Mapping[str, Rows]
    """Training split of every corpus."""
    validation: Mapping[str, Rows]
    """Validation split of every corpus."""
    weights: dict[str, float]
    """Weights of the corpora in the validation loss; they sum to 1."""
    timeline: Timeline
    stretches: tuple[Stretch, ...]
    """The part of each corpus that each part of the run reads."""
    evaluation_size: int
    """Sequences of one evaluation batch."""
    seed: int
    rank: int = 0
    """Data-parallel rank of this process."""
    ranks: int = 1
    """Number of data-parallel ranks."""

    def at(self, step: int) -> np.ndarray:
        """Return this rank's share of the training batch of a step, the first being step 0."""
        share = self.timeline.batch_at(step) // self.ranks
        return self._rows(self.timeline.sequences_before(step) + self.rank * share, share)

    @property
    def streamed(self) -> StreamedSequences | None:
        """The only training split, if it may still be growing."""
        first = next(iter(self.train.values()))
        return first if isinstance(first, StreamedSequences) else None

    def size(self, name: str) -> int:
        """Return the rows of a training split: an estimate while it is growing."""
        return len(self.train[name]) if self.streamed is None else self.streamed.size

    @property
    def sampled_rows(self) -> dict[str, int]:
        """How many rows of each training split `sample` takes its rows from: all of them.

        Of a stream it is those up to the last window that the run reads: the rest may be missing.
        """
        if self.streamed is not None:
            return dict.fromkeys(self.train, self.streamed.span(*read_in_all(self.stretches)))
        return {name: len(rows) for name, rows in self.train.items()}

    def _rows(self, position: int, count: int) -> np.ndarray:
        if self.streamed is not None:
            return self.streamed.batch(self.streamed.order(position, count, self.seed))
        if len(self.train) == 1:
            (only,) = self.train.values()
            return only.batch(sequence_indices(position, count, len(only), self.seed))
        corpora, positions = locate(self.stretches, position, count, self.seed)
        rows = np.empty((count, self.timeline.length + 1), dtype=np.int64)
        for number, sequences in enumerate(self.train.values()):
            here = corpora == number
            rows[here] = sequences.batch(indices_at(positions[here], len(sequences), self.seed))
        return rows

    def share(self, name: str) -> dict[str, Any]:
        """Return how much of a corpus the run reads: tokens, share, epochs, rows of chats."""
        read = dict(zip(self.train, read_in_all(self.stretches), strict=True))
        return {
            "tokens": read[name] * self.timeline.length,
            "share": read[name] / sum(read.values()),
            "epochs": read[name] / self.size(name),
            **self.train[name].facts(),
        }

    def sample(self, *, at_most: int) -> Iterator[np.ndarray]:
        """Yield about `at_most` training sequences, or all of them if there are fewer.

        The sequences are spread evenly over `sampled_rows` and divided among the corpora by weight,
        so sequences of a small corpus with a large weight are repeated.
        """
        sizes = self.sampled_rows
        total = min(at_most, sum(sizes.values()))
        for name, rows in self.train.items():
            count = math.ceil(self.weights[name] * total)
            # count * sizes[name] stays far below 2**63.
            indices = np.arange(count, dtype=np.int64) * sizes[name] // max(1, count)
            for start in range(0, count, CHUNK):
                yield rows.batch(indices[start : start + CHUNK])

    def evaluation(self, name: str, sequences: int | None = None) -> Iterator[np.ndarray]:
        """Return validation batches of a corpus.

        Args:
            name: the corpus.
            sequences: number of sequences, spread evenly over the split; all by default.
        """
        return batches_of(self.validation[name], self.evaluation_size, at_most=sequences)

    def mean(self, losses: Mapping[str, float]) -> float:
        """Return the mean of a figure over the corpora, weighted as the mixture."""
        return weighted_mean(self.weights, losses)

    def mean_error(self, errors: Mapping[str, float | None]) -> float | None:
        """Return the standard error of `mean`; None if that of a corpus is not known."""
        weighed = [(weight, errors[name]) for name, weight in self.weights.items() if weight]
        parts = [weight * error for weight, error in weighed if error is not None]
        return math.hypot(*parts) if len(parts) == len(weighed) else None


def plan_stretches(config: Config) -> tuple[Stretch, ...]:
    """Return the parts of a run that read the corpora with constant weights."""
    weights, stages = config.data.weights, spans(config.schedule, config.timeline)
    given = [weights if s.stage.weights is None else s.stage.weights for s in stages]
    return plan_mixture(
        [[stage.get(name, 0.0) for name in weights] for stage in given],
        [config.timeline.sequences_before(span.end) for span in stages],
    )


def build_batches(config: Config, corpora: Mapping[str, Corpus], processes: Processes) -> Batches:
    """Return the training and validation batches of a run."""
    length = config.data.sequence_length
    return Batches(
        {name: corpus.train.rows(length) for name, corpus in corpora.items()},
        {name: corpus.validation.rows(length) for name, corpus in corpora.items()},
        config.data.shares,
        config.timeline,
        plan_stretches(config),
        config.eval.batch_tokens // length,
        config.run.seed,
        processes.data_rank,
        processes.topology.data_ranks,
    )
