"""Waiting for the tokens of a step while another process still writes them."""

from __future__ import annotations

import time

from muonscale.errors import DataError
from muonscale.lab.console import duration_text
from muonscale.lab.training.checkpoint import saved_steps
from muonscale.lab.training.setup import Run
from muonscale.lab.training.signals import Interrupted, StopRequest

PAUSE = 0.05
"""Seconds between looks at the shards, at first."""
THERE, MISSING, ENDED = range(3)


def wait_for_tokens(run: Run, stop: StopRequest) -> None:
    """Wait until the tokens of the next step are there on all ranks: a collective.

    Raises:
        Interrupted: if a stop is requested in the meantime; the run is saved before.
        DataError: if the process that writes the tokens has ended; the run is saved before.
    """
    rows, step = run.batches.streamed, run.state.step
    if rows is None:
        return
    end = run.config.timeline.sequences_before(step + 1)
    begun, pause, waited_for = time.monotonic(), PAUSE, None
    while True:
        missing, here = rows.missing(end), THERE
        if missing is not None:
            here = MISSING if rows.stream.feed.is_written else ENDED
            missing = rows.missing(end)  # it may have been written, and the process have ended
            here = THERE if missing is None else here
        worst = run.processes.max_flag(here)
        if worst == THERE:
            break
        shards = rows.stream.feed.shards
        if worst == ENDED:
            _save(run)
            raise DataError(
                f"the process that prepares {run.config.data.title} has ended before the training "
                f"split was complete: shard {rows.stream.shards + 1} of {shards} is missing{_why(run)}"
                f"; the run is saved at step {step} and goes on with: {run.resume_command}"
            )
        if (signum := stop.requested()) is not None:
            _save(run)
            raise Interrupted(
                signum,
                f"stopped after step {step} of {run.config.steps}, waiting for tokens, and saved; "
                f"continue with: {run.resume_command}",
            )
        if waited_for is None and missing is not None:
            waited_for = missing
            run.console.log(
                f"step {step + 1} waits for shard {missing + 1} of {shards}, which is being written"
            )
        time.sleep(pause)
        pause = min(1.2 * pause, 0.5)
    if waited_for is not None:
        waited = duration_text(time.monotonic() - begun)
        run.console.log(f"step {step + 1} waited {waited} for its tokens")


def stop_preparing(run: Run) -> None:
    """End the processes that this one has started to prepare the corpora, if they still run."""
    for name, corpus in run.corpora.items():
        if corpus.background is not None and corpus.background.stop():
            run.console.log(
                f"data: the preparation of {name} was stopped with the run; what is done is kept "
                "for a day, and `muonscale prepare` with the same data goes on"
            )


def _why(run: Run) -> str:
    ended = [c.background.error for c in run.corpora.values() if c.background is not None]
    return "".join(f" ({error})" for error in ended)


def _save(run: Run) -> None:
    """Save the run, unless it is at its start or has just been saved: a collective."""
    if run.saver is not None:
        run.saver.wait()  # it may be writing this very step
    root, step = run.folder.checkpoints, run.state.step
    if step and run.processes.on_first(lambda: step not in saved_steps(root)):
        run.save(last=True)
