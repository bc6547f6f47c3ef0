"""The verb `eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from muonscale.cli.arguments import Json, Overrides, split_source
from muonscale.errors import ConfigError

if TYPE_CHECKING:
    from muonscale.lab.evaluation.command import EvalResult

KINDS = ("texts", "tasks", "samples")
"""What is counted; a suite is its tasks."""


def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@STEP]|FOLDER",
            help="A run folder, its newest checkpoint or that of a step; or a Hugging Face folder.",
        ),
    ],
    overrides: Overrides = None,
    *,
    whole: Annotated[
        bool, typer.Option("--all", help="All of the text, not its held-out split.")
    ] = False,
    samples: Annotated[int, typer.Option(min=0, help="Texts to write for each prompt.")] = 0,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Start of a sample; may be given again.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of a sample at most.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Randomness; 0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(min=1, help="Draw from so many likeliest tokens.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the first sample.")] = 0,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME]", help="Tasks of lm-evaluation-harness."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="A paper's tasks: moonlight. --tasks chooses from it.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Task files of your own.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt; else the task's own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of each task at most, for a trial.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once, of tasks.")] = 8,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Let tasks run code that the model writes.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where result.json goes; else eval/ in the folder."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a trained model: held-out loss, bits per byte, samples, benchmark tasks.

    Of a run the text is its own held-out split unless `data.path=` names another; of a model folder
    one has to be named. Examples: `muonscale eval runs/demo`; `muonscale eval runs/demo@300
    data.path=other.txt --all`; `muonscale eval models/mine --tasks arc_easy,hellaswag --limit 100`.
    """
    from rich.console import Console

    from muonscale.lab.evaluation.command import SampleRequest, TaskRequest, evaluate_model
    from muonscale.lab.evaluation.harness import HarnessOptions
    from muonscale.lab.training.console import RunConsole

    path, step = split_source(source)
    names = tuple(name.strip() for name in tasks.split(",")) if tasks is not None else ()
    if "" in names:
        raise ConfigError(f"--tasks {tasks!r}: accepted are names with commas between them")
    options = HarnessOptions(
        include=include_path, limit=limit, batch_size=batch_size, run_code=run_code
    )
    console = RunConsole(Console(stderr=True, highlight=False, soft_wrap=True))
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
    """Return the table of what is new, the samples, and what was known before."""
    from muonscale.lab.report.eval_table import notes_of, rows_of, table_text

    step = found.measured["step"]
    of = "" if step is None else f"step {step:,}, "
    lines = [f"{of}{found.measured['parameters']:,} parameters"]
    if rows := rows_of(found.new):
        lines += ["", table_text(rows)]
    lines += notes_of(found.new)
    for sample in found.new.get("samples", ()):
        lines += [f"--- sample, seed {sample['seed']}", sample["text"], "---"]
    return "\n".join([*lines, "", _kept(found)])


def _kept(found: EvalResult) -> str:
    """Return the sentence on what is new in the file and what stays of earlier evaluations."""
    from muonscale.lab.run_folder import finite

    new = {kind: len(found.new.get(kind, ())) for kind in KINDS}
    fresh = {kind: finite(found.new.get(kind, [])) for kind in KINDS}
    kept = {kind: sum(e not in fresh[kind] for e in found.measured[kind]) for kind in KINDS}
    also = f"; of earlier evaluations: {_counted(kept)}" if any(kept.values()) else ""
    return f"in {found.folder / 'result.json'}, new: {_counted(new)}{also}"


def _counted(numbers: dict[str, int]) -> str:
    return ", ".join(
        f"{number} {kind if number > 1 else kind[:-1]}"
        for kind, number in numbers.items()
        if number
    )
