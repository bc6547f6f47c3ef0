"""Which step reads which sequences, when the batch size changes during a run.

Steps are numbered from 0. A *mark* is a point of a run: a fraction of the run's tokens if below 1,
else training tokens. Its step is the first one that begins at or after it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Phase:
    """Consecutive steps of one batch size."""

    first_step: int
    first_sequence: int
    """Sequences read by all earlier steps."""
    batch: int
    """Sequences per step."""


@dataclass(frozen=True)
class Timeline:
    """The steps of a run."""

    phases: tuple[Phase, ...]
    """In order; the first begins at step 0."""
    steps: int
    length: int
    """Tokens of a sequence."""
    tokens: int
    """Tokens of the configuration, not rounded up to whole steps; fractions refer to them."""

    @classmethod
    def constant(cls, steps: int, batch: int = 1, length: int = 1) -> Timeline:
        """Return the timeline of `steps` steps of one batch size."""
        return cls((Phase(0, 0, batch),), steps, length, steps * batch * length)

    @classmethod
    def changing(
        cls, tokens: int, batch: int, changes: Iterable[tuple[float, int]], length: int
    ) -> Timeline:
        """Return the timeline of a run of `tokens` tokens, rounded up to whole steps.

        Args:
            tokens: tokens of the run.
            batch: sequences per step at the start.
            changes: (mark, sequences per step from this mark on), in order.
            length: tokens of a sequence.

        Raises:
            ValueError: for a mark that is not after the one before it, or not inside the run.
        """
        phases = [Phase(0, 0, batch)]
        for mark, size in changes:
            ahead = -(-_tokens(mark, tokens) // length) - phases[-1].first_sequence
            if ahead <= 0 or _tokens(mark, tokens) >= tokens:
                raise ValueError(
                    f"{mark:,g} is not after the change before it, or not within {tokens:,} tokens"
                )
            phases.append(_after(phases[-1], ahead, size))
        last = phases[-1]
        # None are left if the change comes within the last step, which is rounded up.
        ahead = max(0, -(-tokens // length) - last.first_sequence)
        return cls(tuple(phases), last.first_step + -(-ahead // last.batch), length, tokens)

    def _phase(self, step: int) -> Phase:
        return self.phases[bisect_right(self.phases, step, key=lambda p: p.first_step) - 1]

    def batch_at(self, step: int) -> int:
        """Return the number of sequences that a step reads."""
        return self._phase(step).batch

    @property
    def largest_batch(self) -> int:
        """Sequences of the largest step."""
        return max(phase.batch for phase in self.phases)

    @property
    def described_batches(self) -> str:
        """Tokens per step as text: `8,192` or `8,192, from step 100 on 16,384`."""
        first, *later = self.phases
        parts = [f"{first.batch * self.length:,}"]
        parts += [f"from step {p.first_step:,} on {p.batch * self.length:,}" for p in later]
        return ", ".join(parts)

    def sequences_before(self, step: int) -> int:
        """Return the sequences that all steps before this one read: the position of the run."""
        phase = self._phase(step)
        return phase.first_sequence + (step - phase.first_step) * phase.batch

    def tokens_before(self, step: int) -> int:
        """Return the tokens that all steps before this one train on."""
        return self.sequences_before(step) * self.length

    def step_at(self, mark: float) -> int:
        """Return the first step that begins at or after a mark; `steps` for a mark at the end."""
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
    # The decimal fraction as it is written: 0.07 of 100 tokens is 7, and floats give a little more.
    return math.ceil(Fraction(str(mark)) * (tokens if mark < 1 else 1))
