"""Which modules own a parameter, and what the model as a whole says about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

PARALLEL = (DataParallel, DistributedDataParallel)
WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""What a compiled and a checkpointed module call their original; no part of a parameter's name."""


@dataclass(frozen=True)
class ParamSite:
    """One place at which a model holds a parameter."""

    name: str
    """Name of the parameter there, as in the state dict of the unwrapped model."""
    attribute: str
    module: nn.Module
    ancestors: tuple[nn.Module, ...]
    """Modules around `module`, innermost first."""

    @property
    def place(self) -> str:
        """What `module` is called in the module around it, empty for the model itself."""
        return self.name.split(".")[-2] if "." in self.name else ""


@dataclass(frozen=True)
class Survey:
    """What has to be known about the whole model before one parameter can be judged."""

    owners: dict[Tensor, list[ParamSite]]
    outputs: set[Tensor]
    """Weights that `get_output_embeddings()` names."""
    inputs: set[Tensor]
    """Weights of embeddings, or that `get_input_embeddings()` names."""
    heads_by_shape: set[Tensor]
    """Of a model that declares no output embeddings, weights that map to the vocabulary."""


def survey(model: nn.Module) -> Survey:
    """Return every parameter of `model` with its owners, tied ones with all of them."""
    owners: dict[Tensor, list[ParamSite]] = {}
    for owner in _walk(model, "", ()):
        parameter = owner.module._parameters[owner.attribute]
        assert parameter is not None
        owners.setdefault(parameter, []).append(owner)
    inputs = _declared(model, "get_input_embeddings")
    inputs |= {weight for module in model.modules() if (weight := table(module)) is not None}
    outputs = _declared(model, "get_output_embeddings")
    heads = set() if outputs else _heads_by_shape(model, inputs)
    return Survey(owners=owners, outputs=outputs, inputs=inputs, heads_by_shape=heads)


def table(module: nn.Module) -> Tensor | None:
    """Return the weight of an embedding, torch's own or one that declares the same two sizes."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    sizes = getattr(module, "num_embeddings", None), getattr(module, "embedding_dim", None)
    known = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    return weight if known or tuple(weight.shape) == sizes else None


def is_conv1d(module: nn.Module) -> bool:
    """Return whether `module` is transformers' `Conv1D`, a linear layer stored as (in, out)."""
    named = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    return named and hasattr(module, "nf")


def _walk(module: nn.Module, prefix: str, ancestors: tuple[nn.Module, ...]) -> Iterator[ParamSite]:
    """Yield every (module, parameter) pair, tied ones at each of their places."""
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield ParamSite(f"{prefix}{attribute}", attribute, module, ancestors)
    for child_name, child in module._modules.items():
        if child is not None:
            wrapped = child_name in WRAPPED or isinstance(module, PARALLEL)
            part = "" if wrapped else f"{child_name}."
            yield from _walk(child, f"{prefix}{part}", (module, *ancestors))


def _declared(model: nn.Module, getter: str) -> set[Tensor]:
    """Return the weights that `getter` names on any module of the model (wrappers are seen through)."""
    weights = set()
    for module in model.modules():
        get = getattr(module, getter, None)
        if not callable(get):
            continue
        try:
            declared = get()
        except NotImplementedError:
            continue
        weight = getattr(declared, "weight", None)
        if isinstance(weight, Tensor):
            weights.add(weight)
    return weights


def _heads_by_shape(model: nn.Module, inputs: set[Tensor]) -> set[Tensor]:
    tables = [weight for module in model.modules() if (weight := table(module)) is not None]
    if not tables:
        return set()
    rows, columns = max(tables, key=lambda weight: weight.shape[0]).shape
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight not in inputs]
    heads = [linear.weight for linear in linears if linear.out_features == rows]
    is_width = columns == rows or any(linear.in_features == rows for linear in linears)
    return set(heads[-1:] if is_width else heads)
