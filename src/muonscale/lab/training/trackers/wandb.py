"""Weights & Biases: a run of its server, or, offline, files in the run folder to upload later."""

from __future__ import annotations

from muonscale.lab.training.trackers.records import Beginning


class WandB:
    """Logs to one run of Weights & Biases, whose id is the run's and stays when it is resumed.

    Offline every process that trains leaves a folder of its own under `wandb/`, of the same id.
    """

    rewinds = False  # a step that the server has is not taken back

    def __init__(self, beginning: Beginning) -> None:
        import wandb

        mode = beginning.mode or wandb.Settings().mode  # of WANDB_MODE
        self._run = wandb.init(
            project=beginning.project,
            name=beginning.name,
            id=beginning.id,
            dir=str(beginning.folder),
            config=beginning.config,
            mode=beginning.mode,
            resume="allow" if mode in ("online", "run") else None,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        self._offline = mode not in ("online", "run")

    @property
    def place(self) -> str:
        """The run's page, or the folder of its files."""
        return self._run.settings.sync_dir if self._offline else str(self._run.url)

    def log(self, values: dict[str, float], step: int) -> None:
        """Add to the history of the run."""
        self._run.log(values, step=step)

    def end(self, result: dict[str, float], sample: str, step: int) -> None:
        """Put the result and the sample into the run's summary."""
        self._run.summary.update({f"result/{name}": value for name, value in result.items()})
        self._run.summary.update({"sample": sample})

    def close(self, *, finished: bool) -> None:
        """Hand over what is left; a run that was stopped ends as failed until it is resumed."""
        self._run.finish(exit_code=0 if finished else 1)
