"""The life of a run: set up, train, finish. Its folder is described in muonscale.lab.run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from muonscale.lab.config import Config
from muonscale.lab.models.build import count_parameters
from muonscale.lab.run import RunFolder, write_json
from muonscale.lab.training.checkpoint import newest_checkpoint
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.finish import finish
from muonscale.lab.training.held_out import held_out_record
from muonscale.lab.training.schedule import check_schedule
from muonscale.lab.training.setup import Run, environment, set_up
from muonscale.lab.training.signals import StopRequest, stop_on_signals
from muonscale.lab.training.step import train_step
from muonscale.lab.training.watch import Watch
from muonscale.optim.groups import routing_report

LINE = "\n" + " " * len("optimizer  ")


def train(config: Config, *, resume: bool, console: RunConsole) -> dict[str, Any]:
    """Train a model as configured and return what is written to result.json.

    Args:
        config: the resolved configuration.
        resume: continue the run in `config.run.path`, or start it if nothing was begun there.
        console: where to say what happens.

    Raises:
        MuonscaleError: for anything the user gave that cannot be used.
        Interrupted: after Ctrl-C or SIGTERM, when the run has saved itself.
    """
    folder = RunFolder(config.run.path)
    check_schedule(config.schedule, config.steps)
    with folder.locked():
        begun = folder.check_free(resume=resume)
        if begun:
            folder.check_same(config)
            if (result := folder.result()) is not None:
                console.say(f"run {folder.path} is finished; its result is in result.json")
                return result
        elif resume:
            console.say(f"nothing to resume in {folder.path}: starting at step 0")
        run = set_up(config, folder, console)
        if not begun:
            folder.create(config)
        with stop_on_signals() as stop:
            if begun:
                restore(run)
            record_environment(run)
            introduce(run)
            run_steps(run, stop)
            return finish(run, stop)


def run_steps(run: Run, stop: StopRequest) -> None:
    """Train from the state's step to the last; evaluate and save on the way."""
    state, config, steps = run.state, run.config, run.config.steps
    sequences = max(1, config.eval.tokens // config.data.sequence_length)
    state.model.train()
    with run.console.steps(state.step, steps) as show:
        while state.step < steps:
            watch = Watch(state, config.telemetry)
            record = train_step(
                state, run.batches.at(state.step), config, before_update=watch.before_update
            )
            run.folder.append_metrics(record)
            show(record)
            if (seen := watch.record()) is not None:
                run.folder.append_metrics(seen)
            last = state.step == steps
            if state.step % config.eval.every == 0 and not last:
                run.folder.append_metrics(held_out_record(run, sequences=sequences))
            if state.step % config.checkpoint.every == 0 or last or stop.signum:
                state.save(run.folder.checkpoints, keep=config.checkpoint.keep)
            stop.raise_if_asked(
                f"stopped after step {state.step} of {steps} and saved; "
                f"continue with: muonscale train {run.folder.path} --resume"
            )
    state.optimizer.check_finite()  # of the last step: no other step asks


def restore(run: Run) -> None:
    """Bring a run back to its newest whole checkpoint, or to its start if it has none yet."""
    checkpoint = newest_checkpoint(run.folder.checkpoints, run.console.warn)
    if checkpoint is not None:
        run.state.restore(checkpoint)
    run.folder.truncate_metrics(run.state.step)
    run.console.say(f"resuming {run.folder.path} at step {run.state.step} of {run.config.steps}")


def record_environment(run: Run) -> None:
    """Write env.json: what this run depends on besides its configuration."""
    facts = {
        **environment(run.config, run.device),
        "started_at_step": run.state.step,
        "data": asdict(run.corpus.stats),
    }
    write_json(run.folder.path / "env.json", facts)


def introduce(run: Run) -> None:
    """Say what is trained, on what, and which optimizer rule has which parameters."""
    stats, config = run.corpus.stats, run.config
    size = count_parameters(run.state.model)
    routing = (
        routing_report(run.state.optimizer.param_groups, run.state.model)
        .summary()
        .replace("\n", LINE)
    )
    epochs = config.steps * config.batch_sequences / len(run.batches.train)
    run.console.say(
        f"model      {config.model.preset or config.model.config}: {size.total:,} parameters, "
        f"vocabulary {stats.vocab_size:,}\n"
        f"data       {stats.source}: {stats.train.tokens:,} training tokens, "
        f"{stats.held_out.tokens:,} held out, {stats.train.bytes_per_token:.2f} bytes "
        f"per token\n"
        f"run        {config.steps} steps of {config.train.batch_tokens:,} tokens "
        f"({epochs:.2f} epochs) into {run.folder.path}\n"
        f"optimizer  {routing}"
    )
