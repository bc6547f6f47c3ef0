"""What the product makes of every model class that builds on the meta device."""

from __future__ import annotations

import functools
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import transformers
from torch import Tensor, nn

from muonscale.optim.parameters.groups import parameter_groups
from muonscale.optim.parameters.module_survey import survey
from muonscale.optim.parameters.roles import Role
from tests.optim.parameters.transformers_scan.build import build, model_classes
from tests.optim.parameters.transformers_scan.static import findings
from tests.optim.parameters.transformers_scan.uses import Bare

HEAD = re.compile(r"^(\w*lm_head|\w*_head|head|classifier|score|qa_outputs|logits\w*)$")


@dataclass
class Sweep:
    """The models that were built, and what was wrong with their groups."""

    built: int = 0
    on_muon: int = 0
    """Models with something on Muon."""
    not_built: dict[str, str] = field(default_factory=dict)
    crashed: dict[str, str] = field(default_factory=dict)
    heads: int = 0
    heads_on_muon: list[str] = field(default_factory=list)
    bare: dict[tuple[str, str, tuple[int, ...], str], Bare] = field(default_factory=dict)
    guessed: dict[tuple[str, str], str] = field(default_factory=dict)
    """(class, attribute) of guesses, with a parameter."""
    seconds: float = 0.0

    def table(self) -> str:
        """Return the counts, a line each."""
        rows = [
            (self.built, f"classes built on meta, in {self.seconds:.0f} s"),
            (len(self.not_built), "not built: no default configuration, or a package is missing"),
            (self.on_muon, "with something on Muon"),
            (len(self.crashed), "crashed"),
            (self.heads, "output layers looked at"),
            (len(self.heads_on_muon), "of these on Muon"),
            (len({bare.key for bare in self.bare.values()}), "bare parameters with two long axes"),
            (len(self.guessed), "guesses that are said"),
        ]
        return "\n".join(f"{count:6d}  {what}" for count, what in rows)


@functools.cache
def sweep() -> Sweep:
    """Build every class and make its parameter groups."""
    transformers.logging.set_verbosity_error()
    result, start = Sweep(), time.perf_counter()
    for model_type, name in model_classes():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = build(model_type, name)
            except Exception as error:
                result.not_built[name] = f"{type(error).__name__}: {str(error)[:100]}"
                continue
            _look_at(name, model, result)
    result.seconds = time.perf_counter() - start
    return result


def _look_at(name: str, model: nn.Module, result: Sweep) -> None:
    result.built += 1
    try:
        groups = parameter_groups(model, lr=0.1)
    except Exception as error:
        result.crashed[name] = f"{type(error).__name__}: {error}"
        return
    result.on_muon += any(group["rule"] == "muon" for group in groups)
    group_of = {p: group for group in groups for p in group["params"]}
    for weight, place in _heads(model):
        result.heads += 1
        if weight in group_of and group_of[weight]["rule"] == "muon":
            result.heads_on_muon.append(f"{name} {place} {tuple(weight.shape)}")
    known = findings().parameters
    for parameter, sites in survey(model).owners.items():
        site, group = sites[0], group_of.get(parameter)
        if group is None:
            continue
        names = [cls.__name__ for cls in type(site.module).__mro__]
        if site.name in group["guessed"]:
            result.guessed.setdefault((names[0], site.attribute), f"{name}: {site.name}")
        cls = next((c for c in names if (c, site.attribute) in known), "")
        if not cls or sum(length > 1 for length in parameter.shape) < 2:
            continue
        bare = Bare(
            cls=cls,
            attribute=site.attribute,
            shape=tuple(parameter.shape),
            role=Role(group["role"]),
            rule=group["rule"],
            matrices=group["matrices"].get(site.name),
            guessed=site.name in group["guessed"],
            model=name,
            name=site.name,
        )
        result.bare.setdefault((cls, site.attribute, bare.shape, bare.role), bare)


def _heads(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Yield weights of output layers: what getters name, and Linears that are named as heads."""
    for place, module in model.named_modules():
        get = getattr(module, "get_output_embeddings", None)
        try:
            declared = get() if callable(get) else None
        except Exception:  # the getter of a wrapper may ask a part that is not there
            declared = None
        if isinstance(weight := getattr(declared, "weight", None), Tensor):
            yield weight, f"{place}.get_output_embeddings()"
    for place, child in model.named_children():
        if isinstance(child, nn.Linear) and HEAD.match(place):
            yield child.weight, place
