"""The verb `eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from muonscale.cli.arguments import (
    Json,
    Overrides,
    SampleSeed,
    Temperature,
    Tokens,
    TopK,
    check_exists,
    read_path,
    split_source,
)
from muonscale.errors import ConfigError

if TYPE_CHECKING:
    from muonscale.lab.evaluation.command import EvalResult

KINDS = ("texts", "tasks", "samples")
"""Kinds of measurements that are counted; a suite counts as its tasks."""


def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@STEP]|FOLDER",
            help="A run folder (newest checkpoint, or that of STEP), or a Hugging Face folder.",
        ),
    ],
    overrides: Overrides = None,
    *,
    whole: Annotated[
        bool, typer.Option("--all", help="Evaluate on the whole text, not on its validation split.")
    ] = False,
    samples: Annotated[
        int, typer.Option(min=0, help="Number of texts to generate for each prompt.")
    ] = 0,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text to continue; may be given several times.")
    ] = None,
    tokens: Tokens = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    seed: SampleSeed = 0,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME]", help="Tasks of lm-evaluation-harness."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="The tasks of a paper: moonlight. --tasks selects some of them."),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(parser=read_path, metavar="FOLDER", help="Folder of your own task files."),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(min=0, help="Examples in the prompt (default: the task's own number)."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of documents per task, for a trial.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per batch of a task.")] = 8,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Allow tasks to run code that the model generates.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=read_path,
            metavar="FOLDER",
            help="Folder of result.json (default: eval/ in the model's folder).",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure validation loss, samples and benchmarks of a model.

    A run is evaluated on its own validation split unless `data.path=` names another text. A model
    folder needs `data.path=`, or `--samples` or `--tasks`. Examples: `muonscale eval runs/demo`;
    `muonscale eval runs/demo@300 data.path=other.txt --all`; `muonscale eval models/mine --tasks
    arc_easy,hellaswag --limit 100`.
    """
    path, step = split_source(source)
    check_exists(path)
    from muonscale.lab.console import stderr_console
    from muonscale.lab.evaluation.command import SampleRequest, TaskRequest, evaluate_model
    from muonscale.lab.harness import HarnessOptions
    from muonscale.lab.training.console import RunConsole

    names = tuple(name.strip() for name in tasks.split(",")) if tasks is not None else ()
    if "" in names:
        raise ConfigError(f"--tasks {tasks!r} must be names separated by commas")
    options = HarnessOptions(
        include=include_path, limit=limit, batch_size=batch_size, run_code=run_code
    )
    console = RunConsole(stderr_console())
    with console.stages() as report:
        found = evaluate_model(
            path,
            step,
            overrides or [],
            whole=whole,
            samples=SampleRequest(
                count=samples,
                prompts=tuple(prompt or ()),
                tokens=tokens,
                temperature=temperature,
                top_k=top_k,
                seed=seed,
            ),
            tasks=TaskRequest(names=names, suite=suite, shots=shots, options=options),
            out=out,
            log=console.log,
            report=report,
        )
    typer.echo(json.dumps(found.measured, indent=2) if as_json else _text(found))


def _text(found: EvalResult) -> str:
    """Return the new measurements as a table, the samples, and where the results are."""
    from muonscale.lab.console import table_text
    from muonscale.lab.report.eval_table import HEAD, notes_of, rows_of

    step = found.measured["step"]
    of = "" if step is None else f"step {step:,}, "
    lines = [f"{of}{found.measured['parameters']:,} parameters"]
    if rows := rows_of(found.new):
        lines += ["", table_text(rows, HEAD)]
    lines += notes_of(found.new)
    for sample in found.new.get("samples", ()):
        lines += [f"--- sample, seed {sample['seed']}", sample["text"], "---"]
    return "\n".join([*lines, "", _kept(found)])


def _kept(found: EvalResult) -> str:
    """Return a sentence with the numbers of new and of earlier measurements in the file."""
    from muonscale.lab.files import drop_nonfinite

    new = {kind: len(found.new.get(kind, ())) for kind in KINDS}
    fresh = {kind: drop_nonfinite(found.new.get(kind, [])) for kind in KINDS}
    kept = {kind: sum(e not in fresh[kind] for e in found.measured[kind]) for kind in KINDS}
    also = f"; from earlier evaluations: {_join(kept)}" if any(kept.values()) else ""
    return f"in {found.folder / 'result.json'}, new: {_join(new)}{also}"


def _join(numbers: dict[str, int]) -> str:
    return ", ".join(
        f"{number} {kind if number > 1 else kind[:-1]}"
        for kind, number in numbers.items()
        if number
    )
