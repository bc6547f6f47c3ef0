"""The numbers at the top of a page about runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from muonscale.lab.console import duration_text, si_text
from muonscale.lab.report.page import Tile
from muonscale.lab.report.run_data import RunData, is_finite
from muonscale.lab.report.run_measures import have_different_tokenizers
from muonscale.lab.report.run_tables import last_results


def result_tiles(run: RunData) -> tuple[Tile, ...]:
    """Return the result of a run in short: its loss, its size, its cost and its speed."""
    result = last_results(run)
    tiles = [_loss(result), _bits(result), _tokens(run, result), _time(run, result), _speed(result)]
    return tuple(tile for tile in tiles if tile is not None)


def comparison_tiles(runs: Sequence[RunData]) -> tuple[Tile, ...]:
    """Return which of several runs is best, by how much, and which is fastest."""
    per_byte = have_different_tokenizers(runs)
    key, label = ("bits_per_byte", "bits per byte") if per_byte else ("validation_loss", "loss")
    results = [(run, last_results(run)) for run in runs]
    ranked = sorted(
        ((result[key], run) for run, result in results if is_finite(result.get(key))),
        key=lambda pair: pair[0],
    )
    tiles = []
    if ranked:
        title = "lowest bits per byte" if per_byte else "lowest validation loss"
        tiles.append(Tile(label=title, value=f"{ranked[0][0]:#.4g}", note=ranked[0][1].label))
    if len(ranked) > 1:
        behind = ranked[1][0] - ranked[0][0]
        tiles.append(
            Tile(label=f"next in {label}", value=f"+{behind:.3g}", note=ranked[1][1].label)
        )
    finished = sum(run.finished for run in runs)
    tiles.append(Tile(label="finished", value=f"{finished} of {len(runs)}", note="runs"))
    speeds = [
        (result["tokens_per_second"], run)
        for run, result in results
        if is_finite(result.get("tokens_per_second"))
    ]
    if speeds:
        speed, run = max(speeds, key=lambda pair: pair[0])
        tiles.append(Tile(label="fastest", value=f"{_four_digits(speed)} tokens/s", note=run.label))
    return tuple(tiles)


def _loss(result: dict[str, Any]) -> Tile | None:
    loss, bigram = result.get("validation_loss"), result.get("bigram_loss")
    if not is_finite(loss):
        return None
    note = "nats per token"
    if is_finite(bigram):
        side = "below" if loss < bigram else "above"
        note += f", {abs(loss - bigram):.3g} {side} a bigram model"
    return Tile(label="validation loss", value=f"{loss:#.4g}", note=note)


def _bits(result: dict[str, Any]) -> Tile | None:
    bits, perplexity = result.get("bits_per_byte"), result.get("perplexity")
    if not is_finite(bits):
        return None
    note = f"perplexity {perplexity:.4g}" if is_finite(perplexity) else ""
    return Tile(label="bits per byte", value=f"{bits:#.4g}", note=note)


def _tokens(run: RunData, result: dict[str, Any]) -> Tile | None:
    if not is_finite(tokens := result.get("tokens")):
        return None
    step = result.get("step")
    of = "" if run.finished or run.resolved is None else f" of {run.resolved.steps:,}"
    note = f"{step:,}{of} steps" if is_finite(step) else ""
    return Tile(label="training tokens", value=_four_digits(tokens), note=note)


def _time(run: RunData, result: dict[str, Any]) -> Tile | None:
    seconds = result.get("train_seconds")
    if not is_finite(seconds):
        times = run.positions(run.of_kind("train"), "time")
        seconds = float(times[-1]) if len(times) else None
    if not is_finite(seconds):
        return None
    flops = run.positions(run.of_kind("train"), "FLOPs")
    note = f"{si_text(flops[-1])}FLOP" if len(flops) and is_finite(float(flops[-1])) else ""
    return Tile(label="training time", value=duration_text(seconds), note=note)


def _speed(result: dict[str, Any]) -> Tile | None:
    if not is_finite(speed := result.get("tokens_per_second")):
        return None
    share = result.get("optimizer_share")
    note = f"median; the optimizer took {share:.1%}" if is_finite(share) else "median"
    return Tile(label="tokens per second", value=_four_digits(speed), note=note)


def _four_digits(number: float) -> str:
    """Return a number with separators up to a million, then with four digits: 12,345, 1.234M."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(number) >= factor:
            return f"{number / factor:.4g}{letter}"
    return f"{number:,.0f}"
