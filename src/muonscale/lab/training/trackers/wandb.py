"""Weights & Biases: a run on its server, or, offline, files in the run folder to upload later."""

from __future__ import annotations

from muonscale.lab.training.trackers.records import TrackerStart


class WandB:
    """Logs to one run of Weights & Biases with the id of our run. A resumed run continues it.

    Offline every training process writes its own folder under `wandb/`, with the same id.
    """

    rewinds = False  # the server does not delete steps

    def __init__(self, start: TrackerStart) -> None:
        import wandb

        mode = start.mode or wandb.Settings().mode  # from WANDB_MODE
        self._run = wandb.init(
            project=start.project,
            name=start.name,
            id=start.id,
            dir=str(start.folder),
            config=start.config,
            mode=start.mode,
            resume="allow" if mode in ("online", "run") else None,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        self._offline = mode not in ("online", "run")

    @property
    def place(self) -> str:
        """Page of the run, or the folder of its files."""
        return self._run.settings.sync_dir if self._offline else str(self._run.url)

    def log(self, values: dict[str, float], step: int) -> None:
        """Log to the history of the run."""
        self._run.log(values, step=step)

    def end(self, result: dict[str, float], sample: str, step: int) -> None:
        """Add the result and the sample to the run's summary."""
        self._run.summary.update({f"result/{name}": value for name, value in result.items()})
        self._run.summary.update({"sample": sample})

    def close(self, *, finished: bool) -> None:
        """Flush and close; a run that was stopped counts as failed until it is resumed."""
        self._run.finish(exit_code=0 if finished else 1)
