"""The picture of a run's losses that training leaves in its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from muonscale.errors import CheckpointError
from muonscale.lab.files import write_atomic
from muonscale.lab.report.matplotlib_charts import draw
from muonscale.lab.report.palette import styles
from muonscale.lab.report.run_data import column, is_finite, read_run
from muonscale.lab.report.run_measures import loss_chart


def write_loss_figure(run_folder: Path, result: dict[str, Any] | None = None) -> Path:
    """Draw the losses of a run into `loss.png` in its folder and return that path.

    The picture shows the training loss with its moving mean, the validation loss, and the unigram
    and bigram losses of the result. Losses that are not finite are left out.

    Args:
        run_folder: a run folder with at least one record in its `metrics.jsonl`.
        result: the content of a `result.json` that is not written yet; by default it is read.

    Raises:
        CheckpointError: if the folder has no records, or they cannot be read.
        OSError: if the picture cannot be written.
    """
    run = read_run(run_folder, run_folder.resolve().name)
    if not run.records:
        raise CheckpointError(f"{run_folder / 'loss.png'} is not drawn: {' '.join(run.notes)}")
    if result is not None:
        run = replace(run, result=result)
    losses = column(run.of_kind("eval"), "validation_loss").tolist()
    known = [loss for loss in (*losses, run.result.get("validation_loss")) if is_finite(loss)]
    rule, lr = run.setting("optimizer", "rule"), run.setting("optimizer", "lr")
    title = [run.label]
    title += [f"{rule}, lr {lr:g}"] if rule and is_finite(lr) else []
    title += [f"validation loss {known[-1]:.3f}"] if known else []
    chart = loss_chart([run], "tokens")
    below = "\n".join(filter(None, (chart.x_label, chart.caption)))
    chart = replace(chart, title="  |  ".join(title), x_label=below)
    path = run_folder / "loss.png"
    write_atomic(path, draw(chart, styles([chart]))["png"])
    return path
