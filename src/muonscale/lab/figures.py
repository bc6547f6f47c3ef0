"""Figures from run folders. Imports neither torch nor transformers.

A *record* is one line of `metrics.jsonl`. A *series* is what is drawn of them: x in training tokens,
y in nats per token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from muonscale.errors import CheckpointError
from muonscale.lab.files import read_object

TRAIN_COLOR = "#4477aa"
EVAL_COLOR = "#cc3311"
LINE_COLOR = "#555555"

RESTORE = "restore the file, or remove it"

Series = tuple[np.ndarray, np.ndarray]


def loss_figure(run_folder: Path, result: dict[str, Any] | None = None) -> Path:
    """Draw the losses of a run and return the path of the picture, `loss.png` in its folder.

    Training loss and its moving mean, held-out loss, and the unigram and bigram losses where
    the result has them. Records without a finite loss are left out.

    Args:
        run_folder: a run folder with at least one record in its `metrics.jsonl`.
        result: what is going to be its `result.json`; read from there when not given.

    Raises:
        CheckpointError: if the folder has no records, or one of its files cannot be read.
    """
    records = _read_records(run_folder / "metrics.jsonl")
    if result is None:
        result = read_object(run_folder / "result.json", RESTORE) or {}
    config = read_object(run_folder / "config.json", RESTORE) or {}
    train = _series(records, "train", "loss")
    held_out = _series(records, "eval", "held_out_loss")

    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_losses(axes, train, held_out)
    levels = {name: _finite(result.get(f"{name}_loss")) for name in ("unigram", "bigram")}
    baselines = {name: level for name, level in levels.items() if level is not None}
    _limit(axes, train, held_out, list(baselines.values()))
    _draw_baselines(axes, baselines)
    final = _finite(result.get("held_out_loss"))
    if final is None and len(held_out[1]):
        final = float(held_out[1][-1])
    axes.set_title(_title(run_folder, config, final), fontsize="medium", parse_math=False)
    if len(train[1]) or len(held_out[1]):
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    path = run_folder / "loss.png"
    try:
        figure.savefig(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}; choose a folder with room that you may write to"
        ) from error
    return path


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records in order of steps; of a step written twice, after a resume, the last."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; give a folder that holds what training wrote"
        ) from error
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records[record["kind"], record["step"]] = record
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # cut short when the run was killed
                break
            raise CheckpointError(
                f"{path}, line {number}, is not a record of a run; remove the line"
            ) from error
    if not records:
        raise CheckpointError(
            f"{path} has no records yet; give a run that has begun, which writes one at every step"
        )
    return sorted(records.values(), key=lambda record: record["step"])


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _series(records: list[dict[str, Any]], kind: str, key: str) -> Series:
    """Return the tokens and the finite values of `key`, float64 [n] each."""
    of_kind = [r for r in records if r["kind"] == kind and "tokens" in r]
    pairs = [(r["tokens"], y) for r in of_kind if (y := _finite(r.get(key))) is not None]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def smooth(
    values: np.ndarray,
    reach: int,
    of: Callable[[np.ndarray], float] = np.mean,
    at: np.ndarray | None = None,
) -> np.ndarray:
    """Return the mean of every value and the up to `reach` neighbours on each side of it.

    At the start, where the loss falls fast, as many are taken on the right as there are on the left:
    the mean is then neither early nor late. At the end the window is one-sided.

    Args:
        values: finite, float64 [n].
        reach: neighbours on each side, at most.
        of: what is taken of each window instead of its mean, such as its maximum.
        at: numbers of the values this is wanted for, int64 [m]; all when not given.
    """
    wanted = np.arange(len(values)) if at is None else at
    left = np.minimum(wanted, reach)
    return np.array([of(values[i - n : i + n + 1]) for i, n in zip(wanted, left, strict=True)])


def _draw_losses(axes: Axes, train: Series, held_out: Series) -> None:
    tokens, losses = train
    style: dict[str, Any] = {"color": TRAIN_COLOR, "linewidth": 1.6}
    if len(losses) >= 20:
        reach = max(1, len(losses) // 80)
        axes.plot(tokens, losses, color=TRAIN_COLOR, linewidth=0.6, alpha=0.35)
        label = f"training (mean of {2 * reach + 1} records)"
        axes.plot(tokens, smooth(losses, reach), label=label, **style)
    elif len(losses):
        axes.plot(tokens, losses, ".-", label="training", **style)
    if len(held_out[1]):
        style = {"color": EVAL_COLOR, "linewidth": 1, "markersize": 4, "zorder": 3}
        axes.plot(*held_out, "o-", label="held out", **style)
    if not len(losses) and not len(held_out[1]):
        axes.text(0.5, 0.5, "no finite loss", ha="center", transform=axes.transAxes)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tokens_text(x)))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _tokens_text(tokens: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(tokens) >= unit:
            return f"{tokens / unit:.4g}{letter}"
    return f"{tokens:.4g}"


def _limit(axes: Axes, train: Series, held_out: Series, levels: list[float]) -> None:
    """Fit the axes to the data; a diverged run is cut at one and a half times its start."""
    losses = np.concatenate([train[1], held_out[1], levels])
    tokens = np.concatenate([train[0], held_out[0]])
    if len(tokens) == 0:
        return
    start = max([*train[1][:1], *held_out[1][:1], *levels])
    low, high = losses.min(), min(losses.max(), 1.5 * start)
    margin = 0.05 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(0, 1.02 * tokens.max())


def _draw_baselines(axes: Axes, baselines: dict[str, float]) -> None:
    for name, level in baselines.items():
        axes.axhline(level, color=LINE_COLOR, linestyle="--", linewidth=1, zorder=1)
        axes.annotate(
            f"{name} {level:.2f}",
            (1, level),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            color=LINE_COLOR,
            fontsize="small",
        )


def _title(run_folder: Path, config: dict[str, Any], final: float | None) -> str:
    parts = [run_folder.resolve().name]
    optimizer = config.get("optimizer", {})
    if "rule" in optimizer and "lr" in optimizer:
        parts.append(f"{optimizer['rule']}, lr {optimizer['lr']:g}")
    if final is not None:
        parts.append(f"held-out loss {final:.3f}")
    return "  |  ".join(parts)
