"""The model that a command line names, and its parameter groups; nothing is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from muonscale.errors import ConfigError, MuonscaleError, nearest
from muonscale.lab.config.load import Config, load_config, recipe_names, resolve_config
from muonscale.lab.files import check_local, read_object, to_json
from muonscale.lab.models.build import meta_model
from muonscale.lab.models.config import model_config
from muonscale.lab.models.presets import PRESETS
from muonscale.lab.models.structure import ParameterCount, count_parameters
from muonscale.lab.training.dry_run import planned_shape, transfer_lines
from muonscale.lab.training.param_groups import plan_transfer
from muonscale.lab.training.setup import build_optimizer
from muonscale.optim.parameters.report import GroupingReport, grouping_report
from muonscale.transfer.apply import Parametrization

# Sections that a configuration must have, and that `inspect` does not use.
UNUSED = {"run": {"path": "."}, "data": {"source": "python-stdlib"}, "train": {"steps": 1}}


@dataclass(frozen=True)
class Inspection:
    """The parameter groups of one model."""

    name: str
    """The target, as it was given."""
    model_type: str
    size: ParameterCount
    groups: GroupingReport
    transfer: Parametrization | None = None
    """Multipliers of lr, decay and eps, if `transfer.base` is given."""

    def text(self, *, full: bool = False) -> str:
        """Return the report as text; without `full`, repeated layers are one line."""
        lines = [
            f"model  {self.name} ({self.model_type}): {self.size.total:,} parameters, "
            f"{self.size.without_embeddings:,} without embeddings and head",
            "",
            self.groups.table(full=full),
            "",
            self.groups.summary(),
            *transfer_lines(self.transfer, full=full),
        ]
        return "\n".join(lines)

    def json(self) -> str:
        """Return the report as JSON: every row, and totals by rule."""
        tree: dict[str, Any] = {"model": self.name, "model_type": self.model_type}
        tree |= self.groups.as_dict()
        tree["transfer"] = None if self.transfer is None else self.transfer.as_dict()
        tree["parameters_without_embeddings"] = self.size.without_embeddings
        return to_json(tree)


def inspect(target: str, overrides: Sequence[str] = ()) -> Inspection:
    """Return the parameter groups of a model, which is not allocated.

    Args:
        target: a recipe (name or YAML file), a preset, a run folder, or a Hugging Face
            `config.json` or a folder with one, whose vocabulary is kept. A name of both a recipe
            and a preset means the recipe, as for `muonscale train`.
        overrides: `section.key=value`, such as `optimizer.lr=4e-4` or
            `model.fields.hidden_size=64`.

    Raises:
        MuonscaleError: for a target, an override or a parameter group that cannot be used.
    """
    config, shape = resolve_target(target, overrides)
    model = meta_model(shape)
    transfer = plan_transfer(config, shape)
    groups = build_optimizer(model, config.optimizer, transfer=transfer).param_groups
    report = grouping_report(groups, model)
    return Inspection(target, shape.model_type, count_parameters(model), report, transfer)


def resolve_target(target: str, overrides: Sequence[str]) -> tuple[Config, PreTrainedConfig]:
    """Return the configuration that a target names, and the model's; arguments as for `inspect`.

    For a preset or a Hugging Face model, missing sections have the placeholders of `UNUSED`. A
    published vocabulary is kept unless an override changes it.
    """
    check_local(target, "model")
    if is_preset(target):
        tree = {**deepcopy(UNUSED), "model": {"preset": target}}
        if (vocabulary := PRESETS[target].fields.get("vocab_size")) is not None:
            tree["data"]["vocab_size"] = vocabulary
        config = resolve_config(tree, overrides)
        return config, planned_shape(config)
    if target not in recipe_names() and is_hugging_face(Path(target)):
        config = resolve_config({**deepcopy(UNUSED), "model": {"config": target}}, overrides)
        if config.model.config is None:  # an override names another model
            return config, planned_shape(config)
        return config, model_config(
            config.model, vocab_size=None, sequence_length=1, bos_id=None, eos_id=None
        )
    if target not in recipe_names() and not Path(target).exists():
        raise ConfigError(
            f"there is no model {target!r}; {nearest(target, {*PRESETS, *recipe_names()})}\nA "
            "model is a preset, a recipe, a run folder, or a Hugging Face config.json or its "
            "folder; of a model on the Hub, download its config.json."
        )
    config = load_config(target, overrides)
    return config, planned_shape(config)


def is_preset(target: str) -> bool:
    """Return whether a target names a preset, and not the recipe that trains it."""
    return target in PRESETS and target not in recipe_names()


def is_model(target: str) -> bool:
    """Return whether a target names a model without a batch size and a length of the run."""
    return target not in recipe_names() and (is_preset(target) or is_hugging_face(Path(target)))


def is_hugging_face(path: Path) -> bool:
    """Return whether the `config.json` there names a model type; that of a run does not."""
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json":
        return False
    try:
        return "model_type" in (read_object(path, "give another") or {})
    except MuonscaleError:
        return False
