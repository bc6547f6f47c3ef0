"""A longer run that goes on from a checkpoint of another: `muonscale train RUN --extend`.

The longer run has a folder of its own. It begins with a checkpoint of the other run and the records
up to it, and is then a run that is resumed. If the steps before the checkpoint are those that the
longer run would have taken itself, it ends with the weights of a run that was planned at this
length; only the part of a schedule that is constant, such as that of `wsd` before its decay, makes
this possible.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from muonscale.errors import CheckpointError, ConfigError, command_line
from muonscale.lab.config.load import Config, parse_override, resolve_values
from muonscale.lab.data.mixture import common_sequences
from muonscale.lab.files import write_json
from muonscale.lab.run_folder import FREE_ON_RESUME, RunFolder
from muonscale.lab.training.average import first_average
from muonscale.lab.training.batches import plan_stretches
from muonscale.lab.training.checkpoint import find_damage, folder_name, saved_steps
from muonscale.lab.training.provenance import FACTS, read_provenance, start_folder
from muonscale.lab.training.schedule import multiplier, option_functions, spans

MAY_CHANGE = (
    *FREE_ON_RESUME,
    *("train.tokens", "train.steps", "train.epochs", "train.batch_schedule", "schedule."),
)
"""Keys that a longer run may have different from the one it goes on from."""


@dataclass(frozen=True)
class Extension:
    """A longer run, and the checkpoint it goes on from."""

    source: RunFolder
    before: Config
    """The configuration of the shorter run."""
    config: Config
    """The configuration of the longer run."""
    named: int | None = None
    """The step of the checkpoint, if it was named."""

    @cached_property
    def common(self) -> int:
        """Number of first steps that are the same in both runs."""
        old, new = _plan(self.before), _plan(self.config)
        steps = range(min(self.before.steps, self.config.steps))
        differing = (step for step in steps if old(step) != new(step))
        common = next(differing, len(steps))
        if self.before.data.mixture is not None:
            read = common_sequences(plan_stretches(self.before), plan_stretches(self.config))
            timeline = self.before.timeline
            while timeline.sequences_before(common) > read:
                common -= 1
        return common

    def choose_step(self, warn: Callable[[str], None]) -> int:
        """Return the step of the checkpoint to go on from.

        It is the newest one up to which both runs are the same, or the one that was named.

        Args:
            warn: called with a damaged checkpoint, and with what a named one changes.

        Raises:
            CheckpointError: if there is none.
        """
        saved = saved_steps(self.source.checkpoints)
        if self.named is not None and self.named not in saved:
            raise CheckpointError(
                f"{self.source.path} has no checkpoint of step {self.named}; it has "
                f"{', '.join(map(str, saved)) or 'none'}"
            )
        for step in saved if self.named is None else [self.named]:
            if self.named is None and step > self.common:
                continue
            if (damage := find_damage(self.source.checkpoints / folder_name(step))) is None:
                if step > self.common:
                    warn(self._change(step))
                return step
            warn(f"checkpoint of step {step} of {self.source.path} is damaged ({damage})")
        if self.named is not None or not saved:
            raise CheckpointError(f"{self.source.path} has no checkpoint to go on from")
        raise CheckpointError(
            f"{self.source.path} cannot be made longer as if it had been planned so: a run of "
            f"{self.config.steps} steps differs from one of {self.before.steps} after step "
            f"{self.common}, and the checkpoints are of steps {', '.join(map(str, saved))}. "
            f"{self._change(saved[0])}. If this is what you want, name the checkpoint: "
            f"{command_line('train', f'{self.source.path}@{saved[0]}', '--extend')} ..."
        )

    def _change(self, step: int) -> str:
        """Return what is not as in a run of the new length if it goes on from a step."""
        last = multiplier(self.before.schedule, step - 1, self.before.timeline)
        following = multiplier(self.config.schedule, step, self.config.timeline)
        return (
            f"From step {step} on, steps {self.common + 1} to {step} are those of the shorter run, "
            f"and the learning rate goes from {last:.3g} to {following:.3g} of its peak"
        )

    def create(self, folder: RunFolder, warn: Callable[[str], None]) -> None:
        """Write the start of the longer run into its folder: config.json last.

        Raises:
            CheckpointError: if there is no checkpoint to go on from, or the folder cannot be
                written.
        """
        step = self.choose_step(warn)
        saved = Path("checkpoints") / folder_name(step)
        try:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            shutil.copytree(self.source.path / saved, folder.path / saved, copy_function=_link)
            for copied in (start_folder(self.source), self.source.tokenizer):
                if copied.is_dir():
                    shutil.copytree(copied, folder.path / copied.name)
            start_folder(folder).mkdir(exist_ok=True)
            origin = {"run": str(self.source.path.absolute()), "step": step}
            write_json(
                start_folder(folder) / FACTS,
                {**read_provenance(self.source), "extended": origin},
            )
            folder.write_records(r for r in self.source.read_metrics() if r["step"] <= step)
        except OSError as error:
            raise CheckpointError(
                f"{folder.path} cannot be written: {error}; remove it and try again, or choose "
                "another with run.path=FOLDER"
            ) from error
        folder.create(self.config)


def plan_extension(source: Path, step: int | None, overrides: Sequence[str]) -> Extension:
    """Return the extension of a run.

    What the shorter run gives as a fraction of its length stays where it was in the longer one:
    warm-up, ends of stages, and changes of the batch. The decay keeps its fraction.

    Args:
        source: folder of the shorter run.
        step: step of the checkpoint to go on from; the newest that fits by default.
        overrides: `section.key=value`: a longer length, `run.path`, and any of `MAY_CHANGE`.

    Raises:
        ConfigError: if the run would not be longer, or anything else changes.
        CheckpointError: if this is no run.
    """
    folder = RunFolder(source)
    tree = folder.saved_config()
    before = resolve_values(tree, {})
    given = dict(parse_override(text) for text in overrides)
    if "run.path" not in given or Path(str(given["run.path"])).absolute() == source.absolute():
        raise ConfigError(
            f"give run.path=FOLDER, the folder of the longer run; {source} stays as it is"
        )
    config = resolve_values(tree, {**_kept_in_place(before), **given})
    if config.train.epochs is not None:
        config = config.with_tokens(_sequences(folder, before))
    wrong = {
        key: values
        for key, values in folder.differences(config).items()
        if not key.startswith(MAY_CHANGE)
    }
    if wrong:
        key, (old, new) = next(iter(wrong.items()))
        raise ConfigError(
            f"--extend makes {source} longer and changes nothing else: {key} is {old!r} in the "
            f"run, and {new!r} now; start a new run, or one from its weights with import"
        )
    if config.steps <= before.steps:
        raise ConfigError(
            f"{source} has {before.steps} steps, and {config.steps} are not more; give a longer "
            "train.tokens, train.steps or train.epochs"
        )
    return Extension(folder, before, config, step)


def _kept_in_place(config: Config) -> dict[str, Any]:
    """Return keys and values that keep parts of the schedule where they are in a longer run."""
    timeline = config.timeline
    stages = spans(config.schedule, timeline)
    found: dict[str, Any] = {}
    if not config.schedule.stages:
        found["schedule.warmup"] = stages[0].warmup
    for number, span in enumerate(stages if config.schedule.stages else ()):
        found[f"schedule.stages.{number}.warmup"] = span.warmup
        if span.stage.until is not None:
            found[f"schedule.stages.{number}.until"] = timeline.tokens_before(span.end)
    for number, phase in enumerate(timeline.phases[1:]):
        found[f"train.batch_schedule.{number}.after"] = phase.first_sequence * timeline.length
    return found


def _sequences(folder: RunFolder, config: Config) -> int:
    """Return the sequences of the training split of a run."""
    facts: dict[str, Any] = folder.environment().get("data", {})
    try:
        (corpus,) = facts.values()
        read = corpus["read"]
        return round(read["tokens"] / config.data.sequence_length / read["epochs"])
    except (ValueError, LookupError, TypeError, ZeroDivisionError, AttributeError):
        raise CheckpointError(
            f"{folder.path}/env.json does not say how long an epoch is; give train.tokens"
        ) from None


def _plan(config: Config) -> Callable[[int], tuple[Any, ...]]:
    """Return what a step does besides what follows from the weights, as a function of the step."""
    timeline, stages = config.timeline, spans(config.schedule, config.timeline)
    values, multipliers = option_functions(config)
    average = config.train.average and first_average(config)

    def plan(step: int) -> tuple[Any, ...]:
        stage = next(span.stage for span in stages if step < span.end)
        options = {key: float(f(step)) for key, f in {**values, **multipliers}.items()}
        averaged = average and step + 1 >= average
        reads = timeline.sequences_before(step), timeline.batch_at(step)
        rate = multiplier(config.schedule, step, timeline, stages)
        return rate, reads, options, stage.bias_rate, averaged

    return plan


def _link(source: str, target: str) -> None:
    """Give a file a second name, or copy it where that is not possible; no checkpoint changes."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
