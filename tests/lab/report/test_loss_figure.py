from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from muonscale.errors import CheckpointError
from muonscale.lab.report.loss_figure import write_loss_figure
from muonscale.lab.report.measure_charts import smooth
from muonscale.lab.report.palette import FAINT

RESULT = {"validation_loss": 2.93, "unigram_loss": 5.91, "bigram_loss": 3.92}


def train(step: int, loss: float | None) -> dict[str, Any]:
    return {"kind": "train", "step": step, "tokens": 8192 * step, "loss": loss}


def validation(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "tokens": 8192 * step, "validation_loss": loss}


def write_run(folder: Path, records: list[dict[str, Any]], result: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures as they are saved, to look at what is on them."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **options: Any) -> None:
        if self not in figures:
            figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def lines_of(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    lines = figure.axes[0].get_lines()
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in lines
    }


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_run_is_drawn_with_its_losses_and_baselines(tmp_path: Path, drawn: list[Figure]):
    steps = range(1, 201)
    records = [train(step, 3 + 4 / step) for step in steps]
    records += [validation(step, 3.1 + 4 / step) for step in (100, 200)]
    (tmp_path / "run").mkdir()
    config = {"optimizer": {"rule": "muon", "lr": 0.01}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    path = write_loss_figure(write_run(tmp_path / "run", records, RESULT))
    assert path == tmp_path / "run" / "loss.png"
    assert imread(path).shape[:2] == (720, 1200)
    lines = lines_of(drawn[0])
    assert lines["validation"] == ([819200, 1638400], [3.14, 3.12])
    losses = np.array([record["loss"] for record in records[:200]])
    assert lines["training"] == ([8192 * step for step in steps], smooth(losses, 2).tolist())
    (points,) = (line for line in drawn[0].axes[0].get_lines() if line.get_alpha() == FAINT)
    assert list(points.get_ydata()) == losses.tolist()  # the losses around the moving mean
    assert texts_of(drawn[0]) == ["unigram 5.910", "bigram 3.920"]
    assert drawn[0].axes[0].get_title() == "run  |  muon, lr 0.01  |  validation loss 2.930"


def test_an_unfinished_run_shows_its_last_validation_loss(tmp_path: Path, drawn: list[Figure]):
    records = [train(1, 7.0), validation(1, 6.5), train(2, 6.0), validation(2, 5.5)]
    write_loss_figure(write_run(tmp_path / "run", records))
    assert drawn[0].axes[0].get_title() == "run  |  validation loss 5.500"
    assert texts_of(drawn[0]) == []


def test_one_record_is_drawn_as_a_point(tmp_path: Path, drawn: list[Figure]):
    write_loss_figure(write_run(tmp_path / "run", [train(1, 7.0)]))
    (line,) = drawn[0].axes[0].get_lines()
    assert line.get_marker() == "o"
    low, high = drawn[0].axes[0].get_ylim()
    assert low < 7.0 < high


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path, drawn: list[Figure]):
    records = [train(1, 7.0), train(2, float("nan")), train(3, 5.0), train(4, float("inf"))]
    write_loss_figure(write_run(tmp_path / "run", [*records, train(5, None)]))
    assert lines_of(drawn[0])["training"] == ([8192, 3 * 8192], [7.0, 5.0])


def test_a_run_without_a_finite_loss_says_so(tmp_path: Path, drawn: list[Figure]):
    write_loss_figure(write_run(tmp_path / "run", [train(1, float("nan"))], {"unigram_loss": None}))
    assert texts_of(drawn[0]) == ["no values"]


def test_a_diverged_run_does_not_flatten_the_rest(tmp_path: Path, drawn: list[Figure]):
    records = [train(step, 7.0 - step / 10) for step in range(1, 40)] + [train(40, 1e9)]
    write_loss_figure(write_run(tmp_path / "run", records, RESULT))
    assert drawn[0].axes[0].get_ylim()[1] < 12


def test_a_step_repeated_after_a_resume_counts_once(tmp_path: Path, drawn: list[Figure]):
    records = [train(1, 7.0), train(2, 6.0), train(3, 5.5), train(2, 6.1), train(3, 5.6)]
    write_loss_figure(write_run(tmp_path / "run", records))
    assert lines_of(drawn[0])["training"][1] == [7.0, 6.1, 5.6]


def test_a_line_cut_short_at_the_end_is_ignored(tmp_path: Path, drawn: list[Figure]):
    folder = write_run(tmp_path / "run", [train(1, 7.0), train(2, 6.0)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    write_loss_figure(folder)
    assert lines_of(drawn[0])["training"][1] == [7.0, 6.0]


def test_a_run_name_is_no_formula(tmp_path: Path, drawn: list[Figure]):
    write_loss_figure(write_run(tmp_path / r"a$\b$c_{", [train(1, 7.0)]))
    assert drawn[0].axes[0].get_title() == r"a$\b$c_{"


def test_damaged_files_do_not_keep_the_rest_from_being_drawn(tmp_path: Path, drawn: list[Figure]):
    folder = write_run(tmp_path / "run", [train(1, 7.0), {"step": 2}, train(3, 5.0)], [1])
    write_loss_figure(folder)
    assert lines_of(drawn[0])["training"][1] == [7.0, 5.0]


def test_a_folder_without_records_is_refused(tmp_path: Path):
    for folder in (tmp_path / "nothing", write_run(tmp_path / "run", [])):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
            write_loss_figure(folder)


def test_a_picture_that_cannot_be_written_is_named(tmp_path: Path):
    folder = write_run(tmp_path / "run", [train(1, 7.0)])
    (folder / "loss.png").mkdir()
    with pytest.raises(OSError, match=r"loss\.png"):
        write_loss_figure(folder)
    assert not list(folder.glob(".*"))


def test_records_that_cannot_be_read_are_not_called_missing(tmp_path: Path):
    folder = write_run(tmp_path / "run", [train(1, 7.0)])
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl cannot be read"):
        write_loss_figure(folder)


def test_the_moving_mean_keeps_straight_lines_straight_until_the_end():
    line = np.arange(10.0)
    np.testing.assert_allclose(smooth(line, 2)[:8], line[:8])
    np.testing.assert_allclose(smooth(np.array([1.0, 5.0, 3.0, 7.0]), 1), [1, 3, 5, 5])
    assert smooth(np.array([3.0, 1e30, 3.0, 3.0, 3.0]), 1)[-1] == 3.0
    np.testing.assert_array_equal(smooth(np.array([1.0, 5, 3, 7]), 1, np.max), [1, 5, 7, 7])
