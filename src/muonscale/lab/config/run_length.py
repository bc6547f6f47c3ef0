"""Which step reads which sequences: the batch size may change in the course of a run.

Steps are counted from 0. A *mark* is a place in a run as people write it: a fraction of the run's
tokens below 1, training tokens from 1. It lies at the first step that begins at or after it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Phase:
    """Steps of one batch size."""

    first_step: int
    first_sequence: int
    """Sequences read by all steps before."""
    batch: int
    """Sequences of a step."""


@dataclass(frozen=True)
class Timeline:
    """The steps of a run."""

    phases: tuple[Phase, ...]
    """In order; the first begins at step 0."""
    steps: int
    length: int
    """Tokens of a sequence."""
    tokens: int
    """What was asked for, before it was rounded up to whole steps; fractions are of this."""

    @classmethod
    def constant(cls, steps: int, batch: int = 1, length: int = 1) -> Timeline:
        """Return the timeline of so many steps of one batch size."""
        return cls((Phase(0, 0, batch),), steps, length, steps * batch * length)

    @classmethod
    def changing(
        cls, tokens: int, batch: int, changes: Iterable[tuple[float, int]], length: int
    ) -> Timeline:
        """Return the timeline of a run of so many tokens, rounded up to whole steps.

        Args:
            tokens: of the run.
            batch: sequences of a step at the start.
            changes: (mark, sequences of a step from there on), in order.
            length: tokens of a sequence.

        Raises:
            ValueError: for a mark that is not after the one before it, or not inside the run.
        """
        phases = [Phase(0, 0, batch)]
        for mark, size in changes:
            ahead = -(-_tokens(mark, tokens) // length) - phases[-1].first_sequence
            if ahead <= 0 or _tokens(mark, tokens) >= tokens:
                raise ValueError(
                    f"{mark:,g} is not after what is before it and inside of {tokens:,} tokens"
                    "; marks must rise, and lie inside of the run"
                )
            phases.append(_after(phases[-1], ahead, size))
        last = phases[-1]
        # None are left where the change would come after the last step, which is rounded up.
        ahead = max(0, -(-tokens // length) - last.first_sequence)
        return cls(tuple(phases), last.first_step + -(-ahead // last.batch), length, tokens)

    def _phase(self, step: int) -> Phase:
        return self.phases[bisect_right(self.phases, step, key=lambda p: p.first_step) - 1]

    def batch_at(self, step: int) -> int:
        """Return how many sequences a step reads."""
        return self._phase(step).batch

    @property
    def largest_batch(self) -> int:
        """Sequences of the largest step."""
        return max(phase.batch for phase in self.phases)

    @property
    def described_batches(self) -> str:
        """The tokens of a step: `8,192` or `8,192, from step 100 on 16,384`."""
        first, *later = self.phases
        said = [f"{first.batch * self.length:,}"]
        said += [f"from step {p.first_step:,} on {p.batch * self.length:,}" for p in later]
        return ", ".join(said)

    def sequences_before(self, step: int) -> int:
        """Return how many sequences all steps before this one read: the position of the run."""
        phase = self._phase(step)
        return phase.first_sequence + (step - phase.first_step) * phase.batch

    def tokens_before(self, step: int) -> int:
        """Return how many tokens all steps before this one train on."""
        return self.sequences_before(step) * self.length

    def step_at(self, mark: float) -> int:
        """Return the first step that begins at or after a mark; `steps` for one at the end."""
        sequences = -(-_tokens(mark, self.tokens) // self.length)
        at = bisect_right(self.phases, sequences, key=lambda p: p.first_sequence) - 1
        phase = self.phases[at]
        step = phase.first_step + -(-(sequences - phase.first_sequence) // phase.batch)
        return min(step, self.steps)


def _after(phase: Phase, ahead: int, batch: int) -> Phase:
    """Return the phase that begins at the first step at least `ahead` sequences into another."""
    steps = -(-ahead // phase.batch)
    return Phase(phase.first_step + steps, phase.first_sequence + steps * phase.batch, batch)


def _tokens(mark: float, tokens: int) -> int:
    # A decimal fraction as it is written: 0.07 of 100 tokens is 7, where floats give a little more.
    return math.ceil(Fraction(str(mark)) * (tokens if mark < 1 else 1))
