from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from muonscale.errors import CheckpointError
from muonscale.lab.figures import _tokens_text, loss_figure, smooth

RESULT = {"held_out_loss": 2.93, "unigram_loss": 5.91, "bigram_loss": 3.92}


def train(step: int, loss: float | None) -> dict[str, Any]:
    return {"kind": "train", "step": step, "tokens": 8192 * step, "loss": loss}


def held_out(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "tokens": 8192 * step, "held_out_loss": loss}


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
    records += [held_out(step, 3.1 + 4 / step) for step in (100, 200)]
    (tmp_path / "run").mkdir()
    config = {"optimizer": {"rule": "muon", "lr": 0.01}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    path = loss_figure(write_run(tmp_path / "run", records, RESULT))
    assert path == tmp_path / "run" / "loss.png"
    assert imread(path).shape[:2] == (500, 900)
    lines = lines_of(drawn[0])
    assert lines["held out"] == ([819200, 1638400], [3.14, 3.12])
    assert len(lines["training (mean of 5 records)"][0]) == 200
    assert texts_of(drawn[0]) == ["unigram 5.91", "bigram 3.92"]
    assert drawn[0].axes[0].get_title() == "run  |  muon, lr 0.01  |  held-out loss 2.930"


def test_an_unfinished_run_shows_its_last_held_out_loss(tmp_path: Path, drawn: list[Figure]):
    records = [train(1, 7.0), held_out(1, 6.5), train(2, 6.0), held_out(2, 5.5)]
    loss_figure(write_run(tmp_path / "run", records))
    assert drawn[0].axes[0].get_title() == "run  |  held-out loss 5.500"
    assert texts_of(drawn[0]) == []


def test_one_record_is_drawn_as_a_point(tmp_path: Path, drawn: list[Figure]):
    loss_figure(write_run(tmp_path / "run", [train(1, 7.0)]))
    (line,) = drawn[0].axes[0].get_lines()
    assert line.get_marker() == "."
    low, high = drawn[0].axes[0].get_ylim()
    assert low < 7.0 < high


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path, drawn: list[Figure]):
    records = [train(1, 7.0), train(2, float("nan")), train(3, 5.0), train(4, float("inf"))]
    loss_figure(write_run(tmp_path / "run", [*records, train(5, None)]))
    assert lines_of(drawn[0])["training"] == ([8192, 3 * 8192], [7.0, 5.0])


def test_a_run_without_a_finite_loss_says_so(tmp_path: Path, drawn: list[Figure]):
    loss_figure(write_run(tmp_path / "run", [train(1, float("nan"))], {"unigram_loss": None}))
    assert texts_of(drawn[0]) == ["no finite loss"]


def test_a_diverged_run_does_not_flatten_the_rest(tmp_path: Path, drawn: list[Figure]):
    records = [train(step, 7.0 - step / 10) for step in range(1, 40)] + [train(40, 1e9)]
    loss_figure(write_run(tmp_path / "run", records, RESULT))
    assert drawn[0].axes[0].get_ylim()[1] < 12


def test_a_step_repeated_after_a_resume_counts_once(tmp_path: Path, drawn: list[Figure]):
    records = [train(1, 7.0), train(2, 6.0), train(3, 5.5), train(2, 6.1), train(3, 5.6)]
    loss_figure(write_run(tmp_path / "run", records))
    assert lines_of(drawn[0])["training"][1] == [7.0, 6.1, 5.6]


def test_a_line_cut_short_at_the_end_is_ignored(tmp_path: Path, drawn: list[Figure]):
    folder = write_run(tmp_path / "run", [train(1, 7.0), train(2, 6.0)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    loss_figure(folder)
    assert lines_of(drawn[0])["training"][1] == [7.0, 6.0]


def test_a_run_name_is_no_formula(tmp_path: Path, drawn: list[Figure]):
    loss_figure(write_run(tmp_path / r"a$\b$c_{", [train(1, 7.0)]))
    assert drawn[0].axes[0].get_title() == r"a$\b$c_{"


def test_what_cannot_be_drawn_is_a_sentence(tmp_path: Path):
    folder = tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"metrics.jsonl cannot be read"):
        loss_figure(folder)
    with pytest.raises(CheckpointError, match="has no records yet"):
        loss_figure(write_run(folder, []))
    write_run(folder, [train(1, 7.0), {"step": 2}, train(3, 5.0)])
    with pytest.raises(CheckpointError, match=r"metrics.jsonl, line 2, is not a record"):
        loss_figure(folder)
    with pytest.raises(CheckpointError, match=r"result\.json"):
        loss_figure(write_run(folder, [train(1, 7.0)], [1]))
    (folder / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"result\.json"):
        loss_figure(folder)


def test_the_moving_mean_keeps_straight_lines_straight_until_the_end():
    line = np.arange(10.0)
    np.testing.assert_allclose(smooth(line, 2)[:8], line[:8])
    np.testing.assert_allclose(smooth(np.array([1.0, 5.0, 3.0, 7.0]), 1), [1, 3, 5, 5])
    assert smooth(np.array([3.0, 1e30, 3.0, 3.0, 3.0]), 1)[-1] == 3.0
    np.testing.assert_array_equal(smooth(np.array([1.0, 5, 3, 7]), 1, np.max), [1, 5, 7, 7])


def test_tokens_have_readable_units():
    values = [0, 512, 8192, 250_000, 1_500_000, 2e9, 1e12]
    assert [_tokens_text(value) for value in values] == [
        "0", "512", "8.192k", "250k", "1.5M", "2B", "1T",
    ]  # fmt: skip


def test_drawing_imports_neither_torch_nor_transformers():
    code = (
        "import sys, muonscale.lab.figures\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib.pyplot') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
