"""The verb `prepare`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from muonscale.cli.arguments import Arguments, split_arguments


def prepare(
    arguments: Arguments = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that tokenize; by default one for each CPU."),
    ] = None,
) -> None:
    """Read and tokenize the data of a run, and stop.

    `muonscale train` with the same data then begins at once. A preparation that was stopped or
    killed goes on when it is started again. Examples: `muonscale prepare data.path=my.txt`;
    `muonscale prepare my.yaml data.cache=/shared/tokens`.
    """
    from muonscale.lab.config.load import load_config
    from muonscale.lab.data.prepare import prepare as prepare_corpora
    from muonscale.lab.training.console import RunConsole

    config = load_config(*split_arguments(arguments or []))
    begun = time.monotonic()
    with RunConsole().stages() as report:
        corpora = prepare_corpora(
            config.data, seed=config.run.seed, report=report, processes=processes
        )
    seconds = time.monotonic() - begun
    for name, corpus in corpora.items():
        train, validation = corpus.stats.train, corpus.stats.validation
        typer.echo(
            f"{name}: {train.tokens:,} tokens for training and {validation.tokens:,} for "
            f"validation, {train.bytes_per_token:.2f} bytes each, in {corpus.folder}"
        )
    size = sum(c.stats.train.bytes + c.stats.validation.bytes for c in corpora.values())
    typer.echo(
        f"{size / 1e6:,.1f} MB of text in {seconds:,.1f} s, {size / 1e6 / seconds:,.2f} MB/s"
    )
