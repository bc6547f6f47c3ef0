"""The life of a run: set up, train, finish. Its folder is described in muonscale.lab.run_folder."""

from __future__ import annotations

import resource
import sys
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.profiler import record_function

from muonscale.errors import CheckpointError
from muonscale.lab.config.load import Config
from muonscale.lab.console import si_bytes
from muonscale.lab.files import write_atomic, write_json
from muonscale.lab.models.adapter import merge_adapter
from muonscale.lab.models.build import meta_model
from muonscale.lab.models.convert import save_tokenizer
from muonscale.lab.models.structure import count_parameters
from muonscale.lab.parallel.gather import gather_model
from muonscale.lab.parallel.processes import Processes, init_processes, was_restarted
from muonscale.lab.run_folder import RunFolder, flatten
from muonscale.lab.training.checkpoint import (
    newest_checkpoint,
    resume_advice,
    saved_steps,
    steps_to_keep,
)
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.extend import Extension
from muonscale.lab.training.finish import finish, sample_text
from muonscale.lab.training.out_of_memory import explain_out_of_memory
from muonscale.lab.training.profile import Profiler
from muonscale.lab.training.provenance import record_provenance
from muonscale.lab.training.schedule import check_schedule
from muonscale.lab.training.setup import (
    Run,
    environment,
    prepare_once,
    resolve_device,
    run_flops,
    set_up,
)
from muonscale.lab.training.signals import Interrupted, StopRequest, stop_on_signals
from muonscale.lab.training.step import train_step
from muonscale.lab.training.streaming import stop_preparing, wait_for_tokens
from muonscale.lab.training.tasks import RunTasks
from muonscale.lab.training.telemetry import StepTelemetry
from muonscale.lab.training.trackers.registry import check_trackers
from muonscale.lab.training.validation import measure_validation
from muonscale.optim.parameters.report import grouping_report

LINE = "\n" + " " * len("optimizer  ")


def train(
    config: Config, *, resume: bool, console: RunConsole, extension: Extension | None = None
) -> dict[str, Any]:
    """Train a model as configured and return the content of result.json.

    Processes started by torchrun train together; a job that torchrun has restarted is resumed.

    Args:
        config: the resolved configuration.
        resume: continue the run in `config.run.path`, or start it if it does not exist.
        console: prints messages and progress.
        extension: the run is a longer one than another, and begins with a checkpoint of it.

    Raises:
        MuonscaleError: for any input that cannot be used.
        Interrupted: after Ctrl-C, SIGTERM or SIGHUP, when the run has saved itself.
    """
    folder, device = RunFolder(config.run.path), resolve_device(config.run.device)
    if config.train.epochs is None:
        check_length(config)
    with init_processes(config.parallel, device) as processes, lock_run(folder, processes):
        own = console if processes.is_first else RunConsole.silent()
        if config.train.epochs is not None:
            (corpus,) = prepare_once(config, own, processes).values()
            config = config.with_tokens(len(corpus.train.rows(config.data.sequence_length)))
            check_length(config)
        resume = resume or was_restarted()
        if extension is not None:
            processes.on_first(lambda: begin_extension(extension, folder, own, resume=resume))
            resume = True
        return train_together(config, folder, own, processes, resume=resume)


def check_length(config: Config) -> None:
    """Check what depends on the length of the run: schedule and marks.

    Raises:
        ConfigError: for a schedule or a mark that does not fit into it.
    """
    check_schedule(config)
    steps_to_keep(config)


def begin_extension(
    extension: Extension, folder: RunFolder, console: RunConsole, *, resume: bool
) -> None:
    """Write the start of a longer run, unless it has begun and is resumed.

    Raises:
        CheckpointError: if it cannot begin.
    """
    if not folder.check_free(resume=resume):
        extension.create(folder, console.warn)


def train_together(
    config: Config, folder: RunFolder, console: RunConsole, processes: Processes, *, resume: bool
) -> dict[str, Any]:
    """Train as `train` does, on one of the initialized processes: a collective of all."""

    def find_run() -> tuple[bool, dict[str, Any] | None]:
        begun = folder.check_free(resume=resume)
        if begun:
            folder.check_same(config)
        return begun, folder.result() if begun else None

    begun, result = processes.on_first(find_run)
    if result is not None:
        console.log(folder.finished_text)
        return result
    if resume and not begun:
        console.log(f"nothing to resume in {folder.path}: starting at step 0")
    processes.on_first(lambda: check_trackers(config))
    with explain_write_errors(folder) if begun else nullcontext():
        fresh = processes.on_first(lambda: not begun or starts_at_zero(config, folder))
        run = set_up(config, folder, console, processes, fresh=fresh)
    if not begun:
        processes.on_first(lambda: folder.create(config))
    if fresh:
        processes.on_first(lambda: record_provenance(config, folder))
    with (
        ExitStack() as at_end,
        explain_write_errors(folder),
        explain_out_of_memory(config),
        stop_on_signals(processes.max_flag) as stop,
        closing(run.trackers),
    ):
        at_end.callback(stop_preparing, run)
        seen = restore(run) if begun else []
        processes.on_first(lambda: run.trackers.open(config, folder.path, seen, run.state.step))
        record = run_missed_evaluation(run, stop, seen) if begun else None
        mfu = processes.on_first(lambda: record_environment(run))
        log_overview(run)
        evaluate_start(run, stop, seen)
        final = reached_target(run, stop, record)
        return finish(run, stop, final or run_steps(run, stop, mfu))


@contextmanager
def explain_write_errors(folder: RunFolder) -> Generator[None]:
    """Turn the error of a file that cannot be written into one that says how the run goes on."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder.path}: {error.strerror or error}; remove the cause, and "
            f"{resume_advice(folder.checkpoints)}"
        ) from error


def starts_at_zero(config: Config, folder: RunFolder) -> bool:
    """Return whether a run that is continued has no checkpoint yet.

    Raises:
        CheckpointError: if it had checkpoints, which are gone.
    """
    if saved_steps(folder.checkpoints):
        return False
    root = folder.checkpoints
    if root.is_symlink() and not root.exists():
        raise CheckpointError(
            f"{root} is a link to {root.readlink()}, which does not exist; mount or restore it, or "
            "remove the link if there are no checkpoints"
        )
    before = flatten(folder.saved_config())
    every = max(config.checkpoint.every, int(before.get("checkpoint.every") or 0))
    if config.checkpoint.background or before.get("checkpoint.background"):
        every *= 2  # the first one is complete when the second one begins
    last = max((record["step"] for record in folder.read_metrics()), default=0)
    if last > every:  # the checkpoint of step `every` was written before
        raise CheckpointError(
            f"{folder.metrics} has records up to step {last}, and {root} has no checkpoint; "
            f"restore or mount the checkpoints, or move {folder.metrics.name} away to start again "
            "at step 0"
        )
    return True


@contextmanager
def lock_run(folder: RunFolder, processes: Processes) -> Generator[None]:
    """Lock the folder of a run, once for all ranks: a collective."""
    lock = folder.locked()
    processes.on_first(lock.__enter__)
    try:
        yield
    finally:
        if processes.is_first:
            lock.__exit__(None, None, None)


def run_steps(
    run: Run, stop: StopRequest, mfu_of_rate: float | None = None
) -> dict[str, Any] | None:
    """Train from the current step to the last one; evaluate and save when due.

    Args:
        run: the run.
        stop: ends it after a step.
        mfu_of_rate: the MFU at one token per second, None if it is not known.

    Returns:
        The evaluation that reached `train.target_loss` before the last step, None if none did.
    """
    final = None
    state, config, steps = run.state, run.config, run.config.steps
    permanent = steps_to_keep(config)
    tasks = RunTasks(run)
    state.model.train()
    folder, rank = run.folder.path / "profile", run.processes.rank
    profiler = Profiler(config.profile.step_range, folder, rank, run.device, run.console.warn)
    if (wanted := config.profile.step_range) and wanted[-1] <= state.step:
        run.console.warn(
            f"profile.steps={config.profile.steps} are done: the run is at {state.step}"
        )
    showing = run.console.steps(state.step, steps, every=config.log.every)
    with showing as show, closing(profiler):
        while state.step < steps and final is None:
            wait_for_tokens(run, stop)
            telemetry = StepTelemetry(state, config.telemetry)
            with profiler.step(state.step + 1) as profiled:
                with record_function("muonscale/data"):
                    batch = run.batches.at(state.step)
                record = train_step(
                    state, batch, config, run.processes, before_update=telemetry.before_update
                )
            if state.average is not None:
                state.average.update(state.step)
            if profiled:
                record["profiled"] = True
            if mfu_of_rate is not None:
                record["mfu"] = mfu_of_rate * record["tokens_per_second"]
            run.record(record)
            show(record, (memory_in_use(run.device), *epoch_of(run, state.step)))
            if (measured := telemetry.record()) is not None:
                run.record(measured)
            final = reached_target(run, stop, evaluate_if_due(run, stop))
            sample_if_due(run)
            tasks.measure_if_due(run, last=state.step == steps or final is not None)
            signum = stop.requested()
            due = state.step % config.checkpoint.every == 0 or state.step in permanent
            last = state.step == steps or signum is not None or final is not None
            if run.saver is not None:
                run.saver.poll()
            if due or last:
                run.save(last=last)
            if signum:
                raise Interrupted(
                    signum,
                    f"stopped after step {state.step} of {steps} and saved; "
                    f"continue with: {run.resume_command}",
                )
    state.optimizer.check_finite()  # for the last step, since no later step checks it
    return final


def memory_in_use(device: torch.device) -> str:
    """Return the largest memory of this process so far, on the device it trains on, as text."""
    if device.type == "cuda":
        return si_bytes(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return si_bytes(torch.mps.driver_allocated_memory())
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, else KiB
    return si_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def epoch_of(run: Run, step: int) -> list[str]:
    """Return how often the corpus was read by the end of a step; nothing for a mixture."""
    if len(run.batches.train) > 1:
        return []
    (size,) = map(run.batches.size, run.batches.train)
    return [f"epoch {run.config.timeline.sequences_before(step) / size:.2f}"]


def evaluate_if_due(run: Run, stop: StopRequest) -> dict[str, Any] | None:
    """Evaluate on a sample of the validation split, unless a stop is requested: a collective.

    Returns:
        The record, None if there is no evaluation.
    """
    config, step = run.config, run.state.step
    if step == 0 or step % config.eval.every or step == config.steps:
        return None
    sequences = max(1, config.eval.tokens // config.data.sequence_length)
    record = measure_validation(run, stop, sequences=sequences)
    if record is not None:
        run.record(record)
        run.console.validation(record, config.steps)
    return record


def sample_if_due(run: Run) -> None:
    """Write a text with the model as it is, if `eval.samples_every` says so: a collective."""
    section, step = run.config.eval, run.state.step
    if section.samples_every is None or step % section.samples_every or step == run.config.steps:
        return
    model = gather_model(run.state.model, run.processes)

    def write() -> None:
        assert model is not None
        text = sample_text(run, merge_adapter(model))
        run.folder.samples.mkdir(exist_ok=True)
        write_atomic(run.folder.samples / f"step-{step:08d}.txt", text + "\n")
        run.console.log(f"--- sample after step {step}\n{text}\n---")

    run.processes.on_first(write)


def reached_target(
    run: Run, stop: StopRequest, sampled: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Return the evaluation on the whole validation split if it reaches `train.target_loss`.

    A sample that is below the target by chance does not end a run. A collective of all ranks.

    Args:
        run: the run.
        stop: checked before every batch.
        sampled: the record of an evaluation on a sample at this step, None if there is none.

    Returns:
        None if the sample or the split is above the target, or if there is none of both.
    """
    target, step = run.config.train.target_loss, run.state.step
    if target is None or sampled is None or step == 0 or sampled["validation_loss"] > target:
        return None
    with run.console.stages("") as report:
        record = measure_validation(run, stop, report=partial(report, "evaluation at the target"))
    if record is None:
        return None
    loss = record["validation_loss"]
    side = "at most" if loss <= target else "above"
    run.console.log(
        f"step {step}/{run.config.steps}  validation loss {loss:.4f} on the whole split, {side} "
        f"train.target_loss={target:g}"
    )
    return record if loss <= target else None


def restore(run: Run) -> list[dict[str, Any]]:
    """Restore the newest complete checkpoint of a run, or its start if it has none: a collective.

    Returns:
        On the first rank the metrics records, those after the checkpoint included.
    """
    seen: list[dict[str, Any]] = []
    state, folder, processes = run.state, run.folder, run.processes
    checkpoint = processes.on_first(lambda: newest_checkpoint(folder.checkpoints, run.console.warn))
    if checkpoint is not None:
        state.restore(checkpoint, processes)
    processes.on_first(lambda: seen.extend(folder.truncate_metrics(state.step, run.console.warn)))
    run.console.log(f"resuming {folder.path} at step {state.step} of {run.config.steps}")
    return seen


def run_missed_evaluation(
    run: Run, stop: StopRequest, seen: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the evaluation at this step, run now if the stopped run had not got to it: a collective."""
    here = ("eval", run.state.step)
    before = run.processes.on_first(
        lambda: next((r for r in seen if (r["kind"], r["step"]) == here), None)
    )
    return evaluate_if_due(run, stop) if before is None else before


def evaluate_start(run: Run, stop: StopRequest, seen: list[dict[str, Any]]) -> None:
    """Evaluate a model that starts from a checkpoint before its first step: a collective.

    The evaluation is on the whole validation split, as the one at the end is, so that both can be
    compared.
    """
    if run.config.model.weights is None or run.state.step > 0:
        return
    if run.processes.on_first(lambda: any((r["kind"], r["step"]) == ("eval", 0) for r in seen)):
        return
    with run.console.stages("") as report:
        record = measure_validation(run, stop, report=partial(report, "evaluation of the start"))
    if record is not None:
        run.record(record)
        run.console.log(f"validation loss before training: {record['validation_loss']:.3f}")


def record_environment(run: Run) -> float | None:
    """Write the tokenizer and env.json: everything the run depends on besides its configuration.

    With the tokenizer the run can be exported without the cache of its data.

    Returns:
        The MFU of the run at one token per second, None if FLOPs or the peak are not known.
    """
    # Until the first checkpoint a resumed run may use another corpus.
    if run.state.step == 0 or not run.folder.tokenizer.exists():
        advice = f"remove the cause, and {resume_advice(run.folder.checkpoints)}"
        save_tokenizer(run.tokenizer, run.folder.tokenizer, advice)
    facts: dict[str, Any] = {
        **environment(run),
        "flops": run_flops(run.config, meta_model(run.state.model.config)),
        "started_at_step": run.state.step,
        "trackers": run.trackers.facts(),
        "data": {
            name: {**asdict(corpus.stats), "read": run.batches.share(name)}
            for name, corpus in run.corpora.items()
        },
    }
    write_json(run.folder.path / "env.json", facts)
    if facts["flops"] is None or facts["peak_flops"] is None:
        return None
    return facts["flops"]["per_token"] / (facts["peak_flops"] * facts["processes"])


def log_overview(run: Run) -> None:
    """Log the model, the data and the parameter groups of a run."""
    config = run.config
    size = count_parameters(run.state.model)
    report = grouping_report(run.state.optimizer.param_groups, run.state.model).summary()
    groups = report.replace("\n", LINE)
    run.console.log(
        f"model      {config.model.source}: {size.total:,} parameters, "
        f"vocabulary {len(run.tokenizer):,}\n"
        f"data       {LINE.join(describe_corpus(run, name) for name in run.corpora)}\n"
        f"run        {config.steps} steps of {config.timeline.described_batches} tokens into "
        f"{run.folder.path}\n"
        f"optimizer  {groups}"
    )
    if places := run.trackers.facts():
        listed = LINE.join(f"{name}: {place}" for name, place in places.items())
        run.console.log(f"trackers   {listed}")
    if description := str(run.state.routing):
        run.console.log(f"routing    {description}")


def describe_corpus(run: Run, name: str) -> str:
    """Return the size of a corpus and how much of it the run reads, as a line."""
    stats, read = run.corpora[name].stats, run.batches.share(name)
    share = f"{100 * read['share']:.1f} % of the run, " if len(run.corpora) > 1 else ""
    if stats.train.targets is not None:
        return (
            f"{name}: {stats.train.documents:,} training conversations of {stats.train.tokens:,} "
            f"tokens, {stats.train.targets:,} of them the assistant's, "
            f"{stats.validation.documents:,} for validation; {read['rows']:,} rows, "
            f"{100 * read['padding']:.1f} % of them padding, {read['cut']:,} conversations cut, "
            f"{read['left_out']:,} left out; {share}{read['epochs']:.2f} epochs"
        )
    about = "about " if stats.train.estimated else ""
    return (
        f"{name}: {about}{stats.train.tokens:,} training tokens, {stats.validation.tokens:,} for "
        f"validation, {stats.train.bytes_per_token:.2f} bytes per token; "
        f"{share}{read['epochs']:.2f} epochs"
    )
