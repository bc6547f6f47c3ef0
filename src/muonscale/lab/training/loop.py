"""The life of a run: set up, train, finish. Its folder is described in muonscale.lab.run_folder."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from torch.profiler import record_function
from transformers import PreTrainedConfig

from muonscale.lab.config.load import Config
from muonscale.lab.files import write_json
from muonscale.lab.models.build import meta_model
from muonscale.lab.models.convert import save_tokenizer
from muonscale.lab.models.flops import flops_per_token, optimizer_flops
from muonscale.lab.models.structure import count_parameters
from muonscale.lab.parallel.processes import Processes, joined, restarted
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.checkpoint import newest_checkpoint, saved_steps
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.finish import finish
from muonscale.lab.training.kept_checkpoints import kept_steps
from muonscale.lab.training.profile import Profiler, profiling
from muonscale.lab.training.provenance import record_origin
from muonscale.lab.training.schedule import check_schedule
from muonscale.lab.training.setup import Run, build_optimizer, environment, resolve_device, set_up
from muonscale.lab.training.signals import Interrupted, StopRequest, stop_on_signals
from muonscale.lab.training.step import train_step
from muonscale.lab.training.telemetry import Watch
from muonscale.lab.training.trackers.registry import check_trackers
from muonscale.lab.training.validation import held_out_record
from muonscale.optim.parameters.report import grouping_report

LINE = "\n" + " " * len("optimizer  ")


def train(config: Config, *, resume: bool, console: RunConsole) -> dict[str, Any]:
    """Train a model as configured and return what is written to result.json.

    Processes started by torchrun do so together; a job that torchrun has restarted is resumed.

    Args:
        config: the resolved configuration.
        resume: continue the run in `config.run.path`, or start it if nothing was begun there.
        console: where to say what happens.

    Raises:
        MuonscaleError: for anything the user gave that cannot be used.
        Interrupted: after Ctrl-C or SIGTERM, when the run has saved itself.
    """
    check_schedule(config)
    kept_steps(config)
    folder, device = RunFolder(config.run.path), resolve_device(config.run.device)
    with joined(config.parallel, device) as processes, locked(folder, processes):
        own = console if processes.is_first else RunConsole.silent()
        return train_together(config, folder, own, processes, resume=resume or restarted())


def train_together(
    config: Config, folder: RunFolder, console: RunConsole, processes: Processes, *, resume: bool
) -> dict[str, Any]:
    """Do what `train` does, as one of the processes that have joined: a collective of all."""
    begun, result = processes.on_first(lambda: find_run(config, folder, resume=resume))
    if result is not None:
        console.say(f"run {folder.path} is finished; its result is in result.json")
        return result
    if resume and not begun:
        console.say(f"nothing to resume in {folder.path}: starting at step 0")
    processes.on_first(lambda: check_trackers(config))
    fresh = not processes.on_first(lambda: bool(saved_steps(folder.checkpoints)))
    run = set_up(config, folder, console, processes, fresh=fresh)
    if not begun:
        processes.on_first(lambda: folder.create(config))
    if fresh:
        processes.on_first(lambda: record_origin(config, folder))
    with stop_on_signals(processes.any) as stop, tracked(run) as track:
        if begun:
            restore(run)
        track()
        if begun:
            make_up_evaluation(run, stop)
        processes.on_first(lambda: record_tokenizer(run))
        processes.on_first(lambda: record_environment(run))
        introduce(run)
        run_steps(run, stop)
        return finish(run, stop)


@contextmanager
def locked(folder: RunFolder, processes: Processes) -> Generator[None]:
    """Hold the folder of a run, once for all ranks: a collective."""
    lock = folder.locked()
    processes.on_first(lock.__enter__)
    try:
        yield
    finally:
        if processes.is_first:
            lock.__exit__(None, None, None)


def find_run(
    config: Config, folder: RunFolder, *, resume: bool
) -> tuple[bool, dict[str, Any] | None]:
    """Return whether the run was begun, and its result if it is finished.

    Raises:
        CheckpointError: if it may not be continued, or not with this configuration.
    """
    begun = folder.check_free(resume=resume)
    if not begun:
        return False, None
    folder.check_same(config)
    return True, folder.result()


def run_steps(run: Run, stop: StopRequest) -> None:
    """Train from the state's step to the last; evaluate and save on the way."""
    state, config, steps = run.state, run.config, run.config.steps
    keep, marked = config.checkpoint.keep, kept_steps(config)
    state.model.train()
    folder, rank = run.folder.path / "profile", run.processes.rank
    profiler = Profiler(config.profile.step_range, folder, rank, run.device, run.console.warn)
    if (wanted := config.profile.step_range) and wanted[-1] <= state.step:
        run.console.warn(
            f"profile.steps={config.profile.steps} are done: the run is at {state.step}"
        )
    with run.console.steps(state.step, steps) as show, profiling(profiler):
        while state.step < steps:
            watch = Watch(state, config.telemetry)
            with profiler.step(state.step + 1) as profiled:
                record = next_step(run, watch)
            if profiled:
                record["profiled"] = True
            run.record(record)
            show(record)
            if (seen := watch.record()) is not None:
                run.record(seen)
            evaluate_if_due(run, stop)
            asked = stop.asked()
            due = state.step % config.checkpoint.every == 0 or state.step in marked
            if due or state.step == steps or asked:
                state.save(run.folder.checkpoints, run.processes, keep=keep, marked=marked)
            if asked:
                raise Interrupted(
                    asked,
                    f"stopped after step {state.step} of {steps} and saved; "
                    f"continue with: muonscale train {run.folder.path} --resume",
                )
    state.optimizer.check_finite()  # of the last step: no other step asks


def next_step(run: Run, watch: Watch) -> dict[str, Any]:
    """Read the next batch, take a step and return its metrics record: a collective."""
    with record_function("muonscale/data"):
        batch = run.batches.at(run.state.step)
    return train_step(
        run.state, batch, run.config, run.processes, before_update=watch.before_update
    )


def evaluate_if_due(run: Run, stop: StopRequest) -> None:
    """Evaluate on a sample of the held-out split, unless asked to stop: a collective."""
    config, step = run.config, run.state.step
    if step == 0 or step % config.eval.every or step == config.steps:
        return
    sequences = max(1, config.eval.tokens // config.data.sequence_length)
    record = held_out_record(run, stop, sequences=sequences)
    if record is not None:
        run.record(record)


@contextmanager
def tracked(run: Run) -> Generator[Callable[[], None]]:
    """Give what opens the trackers of a run, once it stands where it begins; close them at the end."""
    seen = run.folder.read_metrics() if run.processes.is_first else []

    def begin() -> None:
        run.processes.on_first(
            lambda: run.trackers.open(run.config, run.folder, seen, run.state.step)
        )

    try:
        yield begin
    finally:
        run.trackers.close()


def restore(run: Run) -> None:
    """Bring a run back to its newest whole checkpoint, or to its start if it has none yet.

    A collective.
    """
    state, folder, processes = run.state, run.folder, run.processes
    checkpoint = processes.on_first(lambda: newest_checkpoint(folder.checkpoints, run.console.warn))
    if checkpoint is not None:
        state.restore(checkpoint, processes)
    processes.on_first(lambda: folder.truncate_metrics(state.step))
    run.console.say(f"resuming {folder.path} at step {state.step} of {run.config.steps}")


def make_up_evaluation(run: Run, stop: StopRequest) -> None:
    """Do an evaluation that was left because the run was asked to stop: a collective."""
    step, folder = run.state.step, run.folder
    seen = run.processes.on_first(
        lambda: any(r["kind"] == "eval" and r["step"] == step for r in folder.read_metrics())
    )
    if not seen:
        evaluate_if_due(run, stop)


def record_tokenizer(run: Run) -> None:
    """Write the tokenizer, so that the run can be exported without the cache of its data."""
    folder = run.folder.tokenizer
    # Until the first checkpoint a resumed run may have found another corpus.
    if run.state.step == 0 or not folder.exists():
        save_tokenizer(run.tokenizer, folder)


def record_environment(run: Run) -> None:
    """Write env.json: what this run depends on besides its configuration."""
    facts = {
        **environment(run),
        "flops": run_flops(run.config, run.state.model.config),
        "started_at_step": run.state.step,
        "trackers": run.trackers.facts(),
        "data": {
            name: {**asdict(corpus.stats), "read": run.batches.share(name)}
            for name, corpus in run.corpora.items()
        },
    }
    write_json(run.folder.path / "env.json", facts)


def run_flops(config: Config, shape: PreTrainedConfig) -> dict[str, int] | None:
    """Return the operations of a run as env.json has them: per token, and of Newton-Schulz per step.

    None for a mixture that does not say how many experts a token goes to.
    """
    model = meta_model(shape)
    per_token = flops_per_token(shape, model, config.data.sequence_length)
    if per_token is None:
        return None
    per_step = optimizer_flops(build_optimizer(model, config.optimizer).param_groups)
    return {"per_token": per_token, "newton_schulz_per_step": per_step}


def introduce(run: Run) -> None:
    """Say what is trained, on what, and which optimizer rule has which parameters."""
    config = run.config
    size = count_parameters(run.state.model)
    groups = (
        grouping_report(run.state.optimizer.param_groups, run.state.model)
        .summary()
        .replace("\n", LINE)
    )
    run.console.say(
        f"model      {config.model.source}: {size.total:,} parameters, "
        f"vocabulary {len(run.tokenizer):,}\n"
        f"data       {LINE.join(describe_corpus(run, name) for name in run.corpora)}\n"
        f"run        {config.steps} steps of {config.timeline.described_batches} tokens into "
        f"{run.folder.path}\n"
        f"optimizer  {groups}"
    )
    if places := run.trackers.facts():
        listed = LINE.join(f"{name}: {place}" for name, place in places.items())
        run.console.say(f"trackers   {listed}")
    if described := str(run.state.routing):
        run.console.say(f"routing    {described}")


def describe_corpus(run: Run, name: str) -> str:
    """Return the size of a corpus and what the run reads of it, as a line."""
    stats, read = run.corpora[name].stats, run.batches.share(name)
    share = f"{100 * read['share']:.1f} % of the run, " if len(run.corpora) > 1 else ""
    if stats.train.targets is not None:
        return (
            f"{name}: {stats.train.documents:,} training conversations of {stats.train.tokens:,} "
            f"tokens, {stats.train.targets:,} of them the assistant's, {stats.held_out.documents:,} "
            f"held out; {read['rows']:,} rows, {100 * read['padding']:.1f} % of them padding, "
            f"{read['cut']:,} conversations cut, {read['left_out']:,} left out; "
            f"{share}{read['epochs']:.2f} epochs"
        )
    return (
        f"{name}: {stats.train.tokens:,} training tokens, {stats.held_out.tokens:,} held out, "
        f"{stats.train.bytes_per_token:.2f} bytes per token; {share}{read['epochs']:.2f} epochs"
    )
