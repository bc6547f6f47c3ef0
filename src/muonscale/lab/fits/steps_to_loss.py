"""Steps of one optimizer to one loss, by batch size: the input of batch laws and frontiers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import CONFIDENCE, Seed, check_resamples, stretch
from muonscale.lab.fits.result import FloatArray


@dataclass(frozen=True, kw_only=True)
class StepsToLoss:
    """The measured `S_L(B)`; its tokens are `T_L(B) = B S_L(B)`."""

    batches: FloatArray
    """B in tokens, rising, `[b]`."""
    log_steps: FloatArray
    """Mean over seeds of log S, `[b]`; infinite where a run did not reach the loss."""
    error: FloatArray
    """Standard error of `log_steps`, `[b]`; NaN if no noise is known."""
    freedom: int
    """Degrees of freedom of the noise; 0 if it is not known."""

    def __post_init__(self) -> None:
        sizes = {len(self.batches), len(self.log_steps), len(self.error)}
        if len(sizes) != 1 or (np.diff(self.batches) <= 0).any():
            raise StudyError(
                "steps to a loss need rising batch sizes, each with a value and an error, got "
                f"{self.batches.tolist()} with {len(self.log_steps)} values and {len(self.error)} "
                "errors"
            )

    @property
    def reached(self) -> np.ndarray:
        """Whether the loss was reached at each batch size: bool `[b]`."""
        return np.isfinite(self.log_steps)

    @property
    def log_tokens(self) -> FloatArray:
        """log T, `[b]`."""
        return self.log_steps + np.log(self.batches)

    def draw(self, resamples: int = 1000, seed: Seed = 0, level: float = CONFIDENCE) -> FloatArray:
        """Return log steps that might have been measured instead, `[resamples, b]`.

        The noise is normal. It is stretched by the ratio of Student's to the normal quantile, since
        it is an estimate itself. Batches that did not reach the loss stay infinite.

        Raises:
            StudyError: if no noise is known, or `resamples` is below 100.
        """
        check_resamples(resamples)
        if self.freedom < 1 or np.isnan(self.error[self.reached]).any():
            raise StudyError(
                f"the noise of seeds has {self.freedom} degrees of freedom, so steps have no "
                "intervals; run at least two seeds"
            )
        noise = np.random.default_rng(seed).standard_normal((resamples, len(self.batches)))
        error = np.where(self.reached, self.error, 0) * stretch(level, self.freedom)
        return self.log_steps + error * noise
