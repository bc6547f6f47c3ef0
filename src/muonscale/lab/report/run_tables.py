"""Tables about runs: results, settings, data, versions; and the commands that made them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from muonscale.lab.config.load import Config, dump_config, load_config, recipe_names
from muonscale.lab.report.eval_table import HEAD, rows_of
from muonscale.lab.report.page import Table
from muonscale.lab.report.run_data import RunData
from muonscale.lab.report.run_measures import finite
from muonscale.optim.options import unused_options

RESULTS = {
    "held_out_loss": ("held-out loss, nats per token", ".4f"),
    "unigram_loss": ("unigram baseline", ".4f"),
    "bigram_loss": ("bigram baseline", ".4f"),
    "bits_per_byte": ("bits per byte", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "tokens": ("training tokens", ",d"),
    "step": ("steps", ",d"),
    "parameters": ("parameters", ",d"),
    "train_seconds": ("seconds of training steps", ",.0f"),
    "tokens_per_second": ("tokens per second, median", ",.0f"),
    "optimizer_share": ("optimizer's share of the time", ".1%"),
    "skipped_steps": ("skipped steps", ",d"),
}
"""Fields of result.json, what they are called, and how they are written."""

COMPARED = {
    "held_out_loss": "held-out loss",
    "bits_per_byte": "bits per byte",
    "unigram_loss": "unigram",
    "bigram_loss": "bigram",
    "tokens": "tokens",
    "tokens_per_second": "tokens/s",
    "optimizer_share": "optimizer",
}

SETTINGS = {
    "model": ("preset", "config", "weights"),
    "optimizer": ("rule", "lr", "weight_decay", "momentum", "post_norm", "scale"),
    "schedule": ("name", "warmup"),
    "train": ("batch_tokens", "tokens", "steps"),
    "data": ("sequence_length", "vocab_size"),
    "transfer": ("base",),
    "run": ("seed",),
}
"""Keys of the configuration that are shown first."""

LOCAL = ("run.path", "run.threads", "run.device", "data.cache")
"""Keys that say where a run was, not what it was."""


def result_table(run: RunData) -> Table:
    """Return the results of a run, or what was last recorded of one that is not finished."""
    result = run.result or _last_records(run)
    rows = [
        (title, _written(result[key], how))
        for key, (title, how) in RESULTS.items()
        if finite(result.get(key))
    ]
    losses = result.get("held_out_losses")
    for name, loss in losses.items() if isinstance(losses, dict) else ():
        rows.insert(1, (f"held-out loss on {name}", _written(loss, ".4f")))
    if finite(result.get("bigram_loss")) and finite(result.get("held_out_loss")):
        difference = result["held_out_loss"] - result["bigram_loss"]
        rows.insert(1, ("its difference to the bigram baseline", f"{difference:+.4f}"))
    return Table(head=("", "value"), rows=tuple(rows), name="results")


def comparison_table(runs: Sequence[RunData]) -> Table:
    """Return the results of several runs beside each other."""
    rows = []
    for run in runs:
        result = run.result or _last_records(run)
        values = [_written(result.get(key), RESULTS[key][1]) for key in COMPARED]
        state = "finished" if run.finished else f"stopped after step {run.last_step:,}"
        rows.append((run.label, state, *values))
    caption = "Losses in nats per token. Of an unfinished run the last evaluation."
    return Table(
        head=("run", "state", *COMPARED.values()), rows=tuple(rows), name="results", caption=caption
    )


def evaluation_table(runs: Sequence[RunData]) -> Table | None:
    """Return what `muonscale eval` has measured of checkpoints of runs; None if nothing."""
    found = [
        (run.label, _written(one.get("step"), ",d"), *row)
        for run in runs
        for one in run.evaluation.get("checkpoints", ())
        for row in rows_of(one)
    ]
    head = ("run", "step", *HEAD)
    if len(runs) == 1:
        found, head = [row[1:] for row in found], head[1:]
    caption = "Measured by `muonscale eval` after training. Standard errors are the harness's."
    rows = tuple(found)
    return Table(head=head, rows=rows, name="evaluation", caption=caption) if rows else None


def settings_table(run: RunData) -> Table:
    """Return the settings that people ask for first."""
    flat = flattened(run.config)
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
    """Return the keys in which runs differ, with their values; None if they do not."""
    flat = [flattened(run.config) for run in runs]
    keys = list(dict.fromkeys(key for tree in flat for key in tree if key not in LOCAL))
    rows = [
        (key, *(_plain(tree.get(key)) for tree in flat))
        for key in keys
        if any(tree.get(key) != flat[0].get(key) for tree in flat)
    ]
    head = ("key", *(run.label for run in runs))
    return Table(head=head, rows=tuple(rows), name="differences") if rows else None


def data_table(runs: Sequence[RunData]) -> Table | None:
    """Return what runs read of their corpora; None if none has written it."""
    rows = [
        (run.label, name, *_corpus(corpus))
        for run in runs
        for name, corpus in _mapping(run.env.get("data")).items()
    ]
    head = ("run", "corpus", "training tokens", "held-out tokens", "read", "share", "epochs")
    if len(runs) == 1:
        rows, head = [row[1:] for row in rows], head[1:]
    return Table(head=head, rows=tuple(rows), name="data") if rows else None


def versions_table(runs: Sequence[RunData]) -> Table | None:
    """Return versions and devices of runs; None if none has written them."""
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
    return Table(head=("", *columns), rows=tuple(rows), name="versions") if rows else None


def started_with(run: RunData) -> str | None:
    """Return the command that the run was last started with; None where it is not known."""
    words = run.env.get("command")
    if not isinstance(words, list) or not words:
        return None
    program = Path(str(words[0])).name.replace("__main__.py", "muonscale")
    return shlex.join([program, *map(str, words[1:])])


def same_again(config: Config, path: str) -> str:
    """Return the command that makes a run with a configuration, from the recipe nearest to it.

    Args:
        config: what the run is made with; its `run.path` is left out.
        path: where the command puts the run.
    """
    wanted = flattened(json.loads(dump_config(config)))
    best: tuple[str, list[str]] | None = None
    for name in recipe_names():
        given = flattened(json.loads(dump_config(load_config(name))))
        words = [
            f"{key}={_yaml(value)}"
            for key, value in wanted.items()
            if value != given.get(key) and key != "run.path" and not _replaced(key, value)
        ]
        if best is None or len(words) < len(best[1]):
            best = (name, words)
    assert best is not None
    return shlex.join(["muonscale", "train", best[0], *best[1], f"run.path={path}"])


def flattened(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return `section.key` to value; what is deeper than that stays a value."""
    return {
        f"{section}.{key}": value
        for section, values in tree.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def _replaced(key: str, value: Any) -> bool:
    """Return whether a key is one of several for the same thing, and not the one that is given."""
    several = ("data.source", "data.path", "data.mixture", "model.preset", "model.config")
    return value is None and key in (*several, "model.weights", "train.tokens", "train.steps")


def _yaml(value: Any) -> str:
    """Return a value as an override has it; JSON is YAML."""
    return value if isinstance(value, str) and value and _is_word(value) else json.dumps(value)


def _is_word(text: str) -> bool:
    """Return whether YAML takes a text for the text that it is."""
    try:
        return (text[0].isalpha() or text[0] == "/") and yaml.safe_load(text) == text
    except yaml.YAMLError:
        return False


def _last_records(run: RunData) -> dict[str, Any]:
    """Return what is known of a run without a result, by the names of result.json."""
    found: dict[str, Any] = {}
    if train := run.of_kind("train"):
        found |= {key: train[-1].get(key) for key in ("step", "tokens", "skipped_steps")}
    if evaluations := run.of_kind("eval"):
        keys = ("held_out_loss", "bits_per_byte", "held_out_losses")
        found |= {key: evaluations[-1].get(key) for key in keys}
    return found


def _corpus(corpus: Any) -> tuple[str, ...]:
    train, held_out, read = (
        _mapping(_mapping(corpus).get(k)) for k in ("train", "held_out", "read")
    )
    values = (train.get("tokens"), held_out.get("tokens"), read.get("tokens"))
    counts = [_written(value, ",d") for value in values]
    return (*counts, _written(read.get("share"), ".1%"), _written(read.get("epochs"), ".2f"))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _written(value: Any, how: str) -> str:
    if not finite(value):
        return ""
    return f"{round(value) if how.endswith('d') else value:{how}}"


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
