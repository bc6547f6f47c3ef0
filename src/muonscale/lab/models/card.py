"""The model card of an exported model: README.md, from the files of its run folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from muonscale.lab.models.flops import active_parameters
from muonscale.lab.models.structure import count_parameters
from muonscale.lab.run_folder import started_with
from muonscale.optim.options import unused_options

SHAPE = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "heads of keys and values",
    "n_routed_experts": "routed experts",
    "num_local_experts": "routed experts",
    "num_experts": "routed experts",
    "num_experts_per_tok": "experts for each token",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "positions",
}
"""Fields of a Hugging Face configuration, and their names in the card."""

LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
tokens = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))
```"""


def model_card(
    config: Mapping[str, Any],
    env: Mapping[str, Any],
    metrics: Iterable[Mapping[str, Any]],
    *,
    step: int,
    model: PreTrainedModel,
    averaged: bool = False,
) -> str:
    """Return the text of README.md: front matter of the Hugging Face hub, then Markdown.

    Unknown facts are left out. Only the last name of a local path is shown.

    Args:
        config: config.json of the run.
        env: env.json of the run, possibly empty.
        metrics: records of metrics.jsonl.
        step: optimizer steps after which the model was saved.
        model: the model, for its architecture and size.
        averaged: whether it is the average of the weights (`train.average`).
    """
    records = [record for record in metrics if record["step"] <= step]
    tokens = next(
        (r["tokens"] for r in records if r["kind"] == "train" and r["step"] == step), None
    )
    seen = "" if tokens is None else f" and {tokens:,} training tokens"
    weights = config["model"].get("weights")
    start = f"the weights of `{Path(weights).name}`" if weights else "random weights"
    parts = [
        f"# {Path(config['run']['path']).name}",
        f"`{type(model).__name__}`, trained from {start} with muonscale: "
        f"{'the average of the weights' if averaged else 'the checkpoint'} after {step:,} "
        f"steps{seen}.",
        "## Model",
        _table(_architecture(config, model)),
        "## Data",
        _table(_data(config, env, tokens)),
        *_evaluation(records, averaged=averaged),
        "## Training",
        _table(_training(config, env)),
        *_command_and_versions(env),
        "## Loading",
        LOADING,
    ]
    return f"---\n{_front_matter(config, model.config)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _front_matter(config: Mapping[str, Any], shape: PreTrainedConfig) -> str:
    corpora = config["data"].get("mixture") or [config["data"]]
    sources = [corpus.get("source") or "" for corpus in corpora]
    datasets = [source.split(":")[1] for source in sources if source.startswith("hf:")]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["muonscale", shape.model_type, config["optimizer"]["rule"]],
        datasets=datasets or None,
    )
    return data.to_yaml().strip()


def _architecture(config: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    shape, size = model.config, count_parameters(model)
    active = active_parameters(shape, model)
    rows: dict[str, Any] = {
        "architecture": f"`{shape.model_type}`",
        "preset": config["model"].get("preset"),
        "parameters": size.total,
        "without embeddings and head": size.without_embeddings,
        "active per token": None if active == size.without_embeddings else active,
    }
    for field, name in SHAPE.items():
        rows.setdefault(name, getattr(shape, field, None))
    return rows


def _data(config: Mapping[str, Any], env: Mapping[str, Any], tokens: int | None) -> dict[str, Any]:
    section, path = config["data"], config["data"].get("path")
    tokenizer = section.get("tokenizer")
    return {
        "source": section.get("source") or (path and Path(path).name),
        "training tokens seen": tokens,
        **_corpora(section, env.get("data", {}), tokens),
        "sequence length": section.get("sequence_length"),
        "tokenizer": _public(tokenizer) if tokenizer else "byte-level BPE, trained on the corpus",
    }


def _corpora(
    section: Mapping[str, Any], known: Mapping[str, Any], tokens: int | None
) -> dict[str, Any]:
    """Return how much of a corpus was read, or how much the whole run reads of each of several."""
    sizes = {name: corpus["train"]["tokens"] for name, corpus in known.items()}
    if section.get("mixture") is None:
        size = next(iter(sizes.values()), None)
        about = any(corpus["train"].get("estimated") for corpus in known.values())
        epochs = f"{tokens / size:.2f}" if tokens and size else None
        return {
            "training tokens of the corpus": f"about {size:,}" if about else size,
            "epochs": epochs,
        }
    return {
        f"of the whole run: {name}": (
            f"{100 * corpus['read']['share']:.1f} %, {corpus['read']['epochs']:.2f} epochs of "
            f"{sizes[name]:,} tokens"
        )
        for name, corpus in known.items()
    }


def _evaluation(records: list[Mapping[str, Any]], *, averaged: bool) -> list[str]:
    """Return the section of the last evaluation, if there is one."""
    key = "average_validation_loss" if averaged else "validation_loss"
    evaluations = [r for r in records if r["kind"] == "eval" and r.get(key) is not None]
    if not evaluations:
        return []
    last = max(evaluations, key=lambda record: record["step"])
    bits = None if averaged else last.get("bits_per_byte")
    parts = {} if averaged else last.get("validation_losses", {})
    rows = {
        "validation loss, nats per token": f"{last[key]:.4f}",
        "bits per byte": None if bits is None else f"{bits:.4f}",
        **{f"on {name}": f"{v:.4f}" for name, v in parts.items()},
        "validation tokens": last.get("validation_tokens"),
        "measured after step": last["step"],
    }
    return ["## Evaluation", _table(rows)]


def _training(config: Mapping[str, Any], env: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of optimizer and run by key, with device, dtypes and processes."""
    optimizer = dict(config["optimizer"])
    unused = unused_options(optimizer["rule"])
    if optimizer.get("post_norm") is None:
        unused |= {"post_norm", "post_norm_eps", "normuon_beta2"}
    if optimizer.get("second_moment") is None:
        unused |= {"second_moment", "second_moment_beta", "second_moment_eps"}
    if optimizer.get("pre_norm") is None:
        unused |= {"pre_norm"}
    if optimizer.get("constraint") != "radial_brake":
        unused |= {"outward_scale"}
    unused |= {name for name in ("row_fraction", "block_period") if optimizer.get(name) == 1}
    if optimizer.get("constraint") is None:
        unused |= {"constraint"}
    sections = {
        "optimizer": {k: v for k, v in optimizer.items() if k not in unused},
        "schedule": config.get("schedule", {}),
        "train": config.get("train", {}),
        "routing": config.get("routing", {}) if env.get("routing", {}).get("routers") else {},
    }
    rows: dict[str, Any] = {
        f"`{name}.{key}`": _public(value) if isinstance(value, str) else value
        for name, section in sections.items()
        for key, value in section.items()
    }
    rows["`run.seed`"] = config["run"].get("seed")
    used = {"dtype of the passes": "precision", "dtype of Newton-Schulz": "ns_dtype"}
    used |= {"device": "device_name", "processes": "processes"}
    return rows | {name: env.get(key) for name, key in used.items()}


def _command_and_versions(env: Mapping[str, Any]) -> list[str]:
    """Return the sections of the command and the versions, if they are known."""
    parts = []
    if words := started_with(env):
        command = shlex.join(map(_public, words))
        parts += ["The run was last started with:", f"```sh\n{command}\n```"]
    if versions := env.get("versions"):
        parts += ["## Versions", _table(versions)]
    return parts


def _public(word: str) -> str:
    """Return a word of a command line with the folders of a local path removed."""
    key, sign, value = word.rpartition("=")
    local = value.startswith(("/", "~", "./", "../"))
    return key + sign + (Path(value).name if local else value)


def _table(rows: Mapping[str, Any]) -> str:
    """Return a Markdown table of two columns, without empty rows."""
    lines = [
        f"| {name} | {_cell(value)} |"
        for name, value in rows.items()
        if value not in (None, {}, [])
    ]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    if isinstance(value, bool | list | tuple | dict):
        text = json.dumps(value)
    else:
        text = f"{value:,}" if isinstance(value, int) else str(value)
    return text.replace("|", "\\|")
