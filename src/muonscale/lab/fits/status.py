"""How a fit ended. A fit that could not be made at all raises StudyError instead."""

from __future__ import annotations

from enum import Enum


class FitStatus(Enum):
    """What the search for the parameters says of itself."""

    CONVERGED = "converged"
    """At a minimum, inside the range that the law allows."""
    BOUND_HIT = "bound hit"
    """A parameter went to the edge of its range: the points do not tell it."""
    MAX_ITERATIONS = "out of iterations"
    """Stopped before a minimum was reached."""
    ABNORMAL = "stopped abnormally"
    """The search gave up away from a minimum."""
