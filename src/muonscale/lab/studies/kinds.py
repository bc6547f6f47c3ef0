"""The kinds of study, and how a recipe becomes one of them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from muonscale.errors import ConfigError, command_line, nearest, shown
from muonscale.lab.config.overrides import assign, split_override
from muonscale.lab.config.read import RECIPES, is_folder, read_tree, shipped_names, shipped_summary
from muonscale.lab.config.validate import validate
from muonscale.lab.studies.config import StudyConfig
from muonscale.lab.studies.study import Study

KINDS = ("compare", "transfer", "scaling", "batch", "telescope")
"""The kinds of study. Each is a package of this one: `NAME.config` holds `NameConfig`, and
`NAME.study` holds `NameStudy`. They are imported when a study is loaded."""

STUDIES = RECIPES / "studies"

NESTED = ("executor", "frontier", "search", "set")
"""Sections that an override may add to a recipe."""

FORM = "key=value or section.key=value; keys of the runs are set.section.key=value"


def study_names() -> list[str]:
    """Return the names of the study recipes shipped with the package."""
    return shipped_names(STUDIES)


def study_summary(name: str) -> str:
    """Return what a shipped study answers, as one line."""
    return shipped_summary(STUDIES, name)


def load_study(recipe: str, overrides: Sequence[str] = ()) -> Study:
    """Return the study of a recipe.

    Args:
        recipe: name of a shipped study, path of a YAML or JSON file, or a study folder.
        overrides: `key=value`, the value read as YAML; `set.train.tokens=...` for keys of runs.

    Raises:
        ConfigError: for an unknown recipe or key, or a value of the wrong type or range.
    """
    tree = read_tree(recipe, "study", STUDIES, "study.json")
    if is_folder(recipe) and recipe not in study_names():
        tree["path"] = recipe  # it may have been moved, or be named from another place

    def has_form(key: str) -> bool:
        section, dot, _ = key.partition(".")
        known = section in NESTED or isinstance(tree.get(section), dict | list)
        return bool(key) and (known or not dot)

    for text in overrides:
        key, value = split_override(text, FORM, has_form)
        run_key = key.startswith("set.")  # keys of `set` have a dot themselves
        assign(tree, key.split(".", 1) if run_key else key.split("."), value)
    kind = tree.get("study")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{recipe}: unknown study={shown(kind)}; {nearest(kind, KINDS)}")
    home = f"muonscale.lab.studies.{kind}"
    config = getattr(import_module(f"{home}.config"), f"{kind.title()}Config")
    study = getattr(import_module(f"{home}.study"), f"{kind.title()}Study")
    return study(validate(config, tree))


def command_of(config: StudyConfig) -> str:
    """Return the command that does a study: by its name, if it comes with the package."""
    for name in study_names():
        tree = read_tree(name, "study", STUDIES, "study.json")
        same_kind = tree.get("study") == config.study
        if same_kind and validate(type(config), {**tree, "path": config.path}) == config:
            return command_line("study", "run", name)
    return command_line("study", "run", config.path)
