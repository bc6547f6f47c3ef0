"""Tables about runs (results, settings, data, versions), and the commands that made the runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from muonscale.lab.config.load import ALTERNATIVES, Config, load_config, recipe_names
from muonscale.lab.report.eval_table import HEAD, format_cell, rows_of
from muonscale.lab.report.page import Table
from muonscale.lab.report.run_data import RunData, is_finite
from muonscale.optim.options import unused_options

RESULTS = {
    "validation_loss": ("validation loss, nats per token", ".4f"),
    "validation_loss_se": ("standard error of the validation loss", ".4f"),
    "start_validation_loss": ("validation loss before training", ".4f"),
    "unigram_loss": ("unigram baseline", ".4f"),
    "bigram_loss": ("bigram baseline", ".4f"),
    "bits_per_byte": ("bits per byte", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "tokens": ("training tokens", ",d"),
    "step": ("steps", ",d"),
    "parameters": ("parameters", ",d"),
    "train_seconds": ("seconds of training steps", ",.0f"),
    "mean_tokens_per_second": ("tokens per second", ",.0f"),
    "tokens_per_second": ("tokens per second, median of the steps", ",.0f"),
    "optimizer_share": ("optimizer's share of the time", ".1%"),
    "skipped_steps": ("skipped steps", ",d"),
}
"""Fields of result.json, with their titles and formats."""

COMPARED = {
    "validation_loss": "validation loss",
    "bits_per_byte": "bits per byte",
    "unigram_loss": "unigram",
    "bigram_loss": "bigram",
    "tokens": "tokens",
    "tokens_per_second": "tokens/s (median)",
    "optimizer_share": "optimizer",
}
"""Fields that are compared between runs, with their titles."""

SETTINGS = {
    "model": ("preset", "config", "weights"),
    "optimizer": (
        "rule",
        "lr",
        "weight_decay",
        "momentum",
        "second_moment",
        "pre_norm",
        "post_norm",
        "constraint",
        "scale",
    ),
    "schedule": ("name", "warmup"),
    "train": ("batch_tokens", "tokens", "steps"),
    "data": ("sequence_length", "vocab_size"),
    "transfer": ("base",),
    "run": ("seed",),
}
"""Keys of the configuration that `settings_table` shows."""

LOCAL = ("run.path", "run.threads", "run.device", "data.cache")
"""Keys that describe where a run was made, not what it is."""


def result_table(run: RunData) -> Table:
    """Return the results of a run; of an unfinished run, the last recorded numbers."""
    result = last_results(run)
    rows = [
        (title, format_cell(result[key], how))
        for key, (title, how) in RESULTS.items()
        if is_finite(result.get(key))
    ]
    losses = result.get("validation_losses")
    for name, loss in losses.items() if isinstance(losses, dict) else ():
        rows.insert(1, (f"validation loss on {name}", format_cell(loss, ".4f")))
    if is_finite(result.get("bigram_loss")) and is_finite(result.get("validation_loss")):
        difference = result["validation_loss"] - result["bigram_loss"]
        rows.insert(1, ("its difference to the bigram baseline", f"{difference:+.4f}"))
    return Table(head=("", "value"), rows=tuple(rows), name="results")


def comparison_table(runs: Sequence[RunData]) -> Table:
    """Return the results of several runs, one row for each."""
    rows = []
    for run in runs:
        result = last_results(run)
        values = [format_cell(result.get(key), RESULTS[key][1]) for key in COMPARED]
        state = "finished" if run.finished else f"stopped after step {run.last_step:,}"
        rows.append((run.label, state, *values))
    caption = "Losses in nats per token; of an unfinished run, the last evaluation."
    return Table(
        head=("run", "state", *COMPARED.values()), rows=tuple(rows), name="results", caption=caption
    )


def evaluation_table(runs: Sequence[RunData]) -> Table | None:
    """Return what `muonscale eval` measured of checkpoints of runs; None if nothing."""
    rows = [
        (run.label, format_cell(one.get("step"), ",d"), *row)
        for run in runs
        for one in run.evaluation.get("checkpoints", ())
        for row in rows_of(one)
    ]
    head = ("run", "step", *HEAD)
    if len(runs) == 1:
        rows, head = [row[1:] for row in rows], head[1:]
    caption = "Measured by `muonscale eval` after training. Standard errors are the harness's."
    return _table(head, rows, "evaluation", caption)


def settings_table(run: RunData) -> Table:
    """Return the settings that describe a run in short."""
    flat = _flatten(run.config)
    unused = [f"optimizer.{name}" for name in unused_options(flat.get("optimizer.rule"))]
    single = {"source": flat.get("data.source"), "path": flat.get("data.path")}
    corpora = [_mapping(corpus) for corpus in flat.get("data.mixture") or [single]]
    keys = [f"{section}.{name}" for section, names in SETTINGS.items() for name in names]
    rows = [
        (key, _plain(flat[key])) for key in keys if flat.get(key) is not None and key not in unused
    ]
    read = ", ".join(str(c.get("name") or c.get("source") or c.get("path")) for c in corpora)
    return Table(head=("key", "value"), rows=(*rows, ("data", read)), name="settings")


def differences_table(runs: Sequence[RunData]) -> Table | None:
    """Return the keys in which runs differ, with their values; None if there are none."""
    flat = [_flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for tree in flat for key in tree if key not in LOCAL))
    rows = [
        (key, *(_plain(tree.get(key)) for tree in flat))
        for key in keys
        if any(tree.get(key) != flat[0].get(key) for tree in flat)
    ]
    return _table(("key", *(run.label for run in runs)), rows, "differences")


def data_table(runs: Sequence[RunData]) -> Table | None:
    """Return how much runs read of their corpora; None if no run recorded it."""
    rows = [
        (run.label, name, *_corpus_cells(corpus))
        for run in runs
        for name, corpus in _mapping(run.env.get("data")).items()
    ]
    head = ("run", "corpus", "training tokens", "validation tokens", "read", "share", "epochs")
    if len(runs) == 1:
        rows, head = [row[1:] for row in rows], head[1:]
    return _table(head, rows, "data")


def versions_table(runs: Sequence[RunData]) -> Table | None:
    """Return versions and devices of runs; None if no run recorded them."""
    keys = ("platform", "device", "device_name", "processes", "layout", "threads", "precision")
    keys += ("ns_dtype", "experts")
    known = [
        {k: run.env.get(k) for k in keys} | _mapping(run.env.get("versions"))
        for run in runs
        if run.env
    ]
    names = dict.fromkeys(name for tree in known for name in tree)
    columns = [run.label for run in runs if run.env] if len(runs) > 1 else ["value"]
    rows = [(name, *(_plain(tree.get(name)) for tree in known)) for name in names]
    rows = [row for row in rows if any(row[1:])]
    return _table(("", *columns), rows, "versions")


def reproduce_command(config: Config, path: str) -> str:
    """Return the command that trains with a configuration, starting from the nearest recipe.

    Args:
        config: the configuration; its `run.path` is ignored.
        path: the folder of the new run.
    """
    wanted = _flatten(config.model_dump(mode="json"))

    def overrides(recipe: str) -> list[str]:
        given = _flatten(load_config(recipe).model_dump(mode="json"))
        return [
            f"{key}={_yaml(value)}"
            for key, value in wanted.items()
            # Such a key that is None needs no override: another one is given.
            if value != given.get(key)
            and not (value is None and any(key in keys for keys in ALTERNATIVES))
            if key != "run.path"
        ]

    words = min(([recipe, *overrides(recipe)] for recipe in recipe_names()), key=len)
    return shlex.join(["muonscale", "train", *words, f"run.path={path}"])


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration by `section.key`; deeper mappings stay values."""
    return {
        f"{section}.{key}": value
        for section, values in tree.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def _yaml(value: Any) -> str:
    """Return a value as an override writes it: as plain text if YAML reads it so, else as JSON."""
    if isinstance(value, str) and value and (value[0].isalpha() or value[0] == "/"):
        try:
            if yaml.safe_load(value) == value:
                return value
        except yaml.YAMLError:
            pass
    return json.dumps(value)


def last_results(run: RunData) -> dict[str, Any]:
    """Return the result of a run; of an unfinished run, its last records by the same keys."""
    result = dict(run.result)
    if not result and (train := run.of_kind("train")):
        result |= {key: train[-1].get(key) for key in ("step", "tokens", "skipped_steps")}
    if not run.result and (evaluations := run.of_kind("eval")):
        keys = ("validation_loss", "validation_loss_se", "bits_per_byte", "validation_losses")
        result |= {key: evaluations[-1].get(key) for key in keys}
    return result


def _table(
    head: tuple[str, ...], rows: Sequence[tuple[str, ...]], name: str, caption: str = ""
) -> Table | None:
    return Table(head=head, rows=tuple(rows), name=name, caption=caption) if rows else None


def _corpus_cells(corpus: Any) -> tuple[str, ...]:
    train, validation, read = (
        _mapping(_mapping(corpus).get(k)) for k in ("train", "validation", "read")
    )
    values = (train.get("tokens"), validation.get("tokens"), read.get("tokens"))
    counts = [format_cell(value, ",d") for value in values]
    return (
        *counts,
        format_cell(read.get("share"), ".1%"),
        format_cell(read.get("epochs"), ".2f"),
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
