"""Which modules own a parameter, and what the model as a whole says about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from muonscale.optim.parameters.adapters import inner_layers
from muonscale.optim.parameters.forward_path import output_layers
from muonscale.optim.parameters.module_source import PARALLEL, WRAPPED

CONVOLUTIONS = (nn.modules.conv._ConvNd,)


@dataclass(frozen=True)
class ParamSite:
    """One place at which a model holds a parameter.

    A parametrized weight (`weight_norm`, `spectral_norm`, pruning, old and new) is seen where the
    layer has it: `module` is the layer, and `attribute` is "weight".
    """

    name: str
    """Name of the parameter there, as in the state dict of the unwrapped model."""
    attribute: str
    module: nn.Module
    ancestors: tuple[nn.Module, ...]
    """Modules around `module`, innermost first."""
    place: str = ""
    """What `module` is called in the module around it, empty for the model itself."""
    part: str = ""
    """What a parametrization keeps here in place of `attribute`: "magnitude" for the gain of
    `weight_norm`, "part" for one of several tensors that are no weight; empty for the weight."""

    @property
    def path(self) -> list[str]:
        """The names of the modules around the parameter, `module`'s last."""
        if ".parametrizations." in f".{self.name}":
            return self.name.rpartition("parametrizations.")[0].split(".")[:-1]
        return self.name.split(".")[:-1]


@dataclass(frozen=True)
class Survey:
    """What has to be known about the whole model before one parameter can be judged."""

    owners: dict[Tensor, list[ParamSite]]
    inputs: set[Tensor]
    """Weights of embeddings, and of the modules that `get_input_embeddings()` returns."""
    heads: dict[Tensor, str]
    """Weights of output layers, each with the reason."""
    unclear: Tensor | None = None
    """The last matrix of a model whose code could not be followed to an output layer."""


def survey(model: nn.Module) -> Survey:
    """Return every parameter of `model` with its owners, tied ones with all of them."""
    owners: dict[Tensor, list[ParamSite]] = {}
    for site, parameter in _walk(model, _Place()):
        owners.setdefault(parameter, []).append(site)
    inputs = {w for module in model.modules() if (w := table(module)) is not None}
    for module in _declared(model, "get_input_embeddings"):
        # What takes pixels or sound in is often a convolution, and stays one.
        if not isinstance(module, CONVOLUTIONS) and (weight := stored_weight(module)) is not None:
            inputs.add(weight)
    heads, unclear = _heads(model, inputs)
    return Survey(owners=owners, inputs=inputs, heads=heads, unclear=unclear)


def table(module: nn.Module) -> Tensor | None:
    """Return the weight of an embedding, torch's own or one that declares the same two sizes."""
    weight = stored_weight(module)
    if weight is None:
        return None
    sizes = getattr(module, "num_embeddings", None), getattr(module, "embedding_dim", None)
    known = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    return weight if known or tuple(weight.shape) == sizes else None


def stored_weight(module: nn.Module) -> nn.Parameter | None:
    """Return the parameter that is, or that a parametrization turns into, a layer's `weight`."""
    for attribute in ("weight", "weight_v", "weight_orig"):
        if isinstance(weight := module._parameters.get(attribute), nn.Parameter):
            return weight
    if parametrize.is_parametrized(module, "weight"):
        originals = module.parametrizations.weight._parameters  # pyrefly: ignore
        return originals.get("original1", originals.get("original"))
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Return whether `module` is transformers' `Conv1D`, a linear layer stored as (in, out)."""
    named = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    return named and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Return whether `module` is a linear layer, torch's or transformers' `Conv1D`."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


@dataclass(frozen=True)
class _Place:
    """Where a walk through the model has come."""

    prefix: str = ""
    name: str = ""
    ancestors: tuple[nn.Module, ...] = ()


def _walk(module: nn.Module, place: _Place) -> Iterator[tuple[ParamSite, nn.Parameter]]:
    """Yield every parameter with its place, tied ones once for each of their places."""
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield _site(module, attribute, place), parameter
    for child_name, child in module._modules.items():
        if child is None:
            continue
        around = (module, *place.ancestors)
        if child_name in WRAPPED or isinstance(module, PARALLEL):
            yield from _walk(child, _Place(place.prefix, place.name, around))
        else:
            yield from _walk(child, _Place(f"{place.prefix}{child_name}.", child_name, around))


def _site(module: nn.Module, attribute: str, place: _Place) -> ParamSite:
    name = f"{place.prefix}{attribute}"
    if isinstance(module, parametrize.ParametrizationList):
        _, layer, *around = place.ancestors  # the first is the layer's dict of parametrizations
        of_layer = name.rpartition(".parametrizations.")[0].rpartition(".")[2]
        part = _part_of_list(module, attribute)
        return ParamSite(name, place.name, layer, tuple(around), of_layer, part)
    hooked = {
        getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
        for hook in module._forward_pre_hooks.values()
    }
    computed, _, ending = attribute.rpartition("_")
    if computed in hooked and ending in ("g", "v", "orig"):
        part = "magnitude" if ending == "g" else ""
        return ParamSite(name, computed, module, place.ancestors, place.name, part)
    return ParamSite(name, attribute, module, place.ancestors, place.name)


def _part_of_list(originals: parametrize.ParametrizationList, attribute: str) -> str:
    if attribute == "original":
        return ""
    if type(originals[0]).__name__ == "_WeightNorm":
        return "magnitude" if attribute == "original0" else ""
    return "part"


def _declared(model: nn.Module, getter: str) -> Iterator[nn.Module]:
    """Yield the modules that `getter` names on any module of the model (wrappers are seen through)."""
    for module in model.modules():
        get = getattr(module, getter, None)
        # A wrapper's getter may ask a part that is not there, and raise anything.
        try:
            declared = get() if callable(get) else None
        except Exception:
            continue
        listed = declared if isinstance(declared, (list, tuple, nn.ModuleList)) else [declared]
        for item in listed:
            if isinstance(item, nn.Module):
                yield from inner_layers(item)


def _heads(model: nn.Module, inputs: set[Tensor]) -> tuple[dict[Tensor, str], Tensor | None]:
    """Return the weights of output layers that are not embeddings, each with the reason.

    The second value is the last matrix of the model, if the output layer was not found because the
    code could not be followed.
    """
    heads: dict[Tensor, str] = {}
    for module in _declared(model, "get_output_embeddings"):
        if (weight := stored_weight(module)) is not None:
            heads.setdefault(weight, "get_output_embeddings()")
    found = output_layers(model)
    # A model of several modalities holds whole language models, each with a head.
    inner = [m for m in model.modules() if m is not model and hasattr(m, "generate")]
    for layer in [*found.layers, *(layer for m in inner for layer in output_layers(m).layers)]:
        weight = layer if isinstance(layer, nn.Parameter) else _matrix_of(layer)
        # A square last matrix (a pooler) maps hidden activations to hidden activations.
        if weight is not None and weight.ndim > 1 and weight.shape[-1] != weight.shape[-2]:
            heads.setdefault(weight, "last layer of the forward path")
    for weight in _heads_by_shape(model, inputs, last=not heads):
        heads.setdefault(weight, "outputs = rows of the embedding")
    linears = [w for m in model.modules() if (w := _matrix_of(m)) is not None and w not in inputs]
    unclear = linears[-1] if linears and not heads and not found.followed else None
    if unclear is not None and unclear.shape[-1] == unclear.shape[-2]:
        unclear = None
    return {weight: why for weight, why in heads.items() if weight not in inputs}, unclear


def _matrix_of(layer: nn.Module) -> Tensor | None:
    return stored_weight(layer) if is_linear(layer) else None


def _heads_by_shape(model: nn.Module, inputs: set[Tensor], *, last: bool) -> list[Tensor]:
    """Return the weights of Linears with as many outputs as an embedding has rows.

    The number may be padded to a multiple of 128, as for tensor cores, if it is a vocabulary's. If
    it is also a width inside the model, it tells nothing, except, with `last`, of the last such
    Linear and the largest embedding.
    """
    tables = [weight for module in model.modules() if (weight := table(module)) is not None]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    linears = [m for m in linears if stored_weight(m) not in inputs]
    widths = {m.in_features for m in linears} | {t.shape[-1] for t in tables}
    largest = max((t.shape[0] for t in tables), default=0)
    heads: list[Tensor | None] = []
    for rows in {t.shape[0] for t in tables}:
        if rows < min(largest, _SMALLEST_VOCABULARY):
            continue
        padded = -(-rows // 128) * 128 if rows >= _SMALLEST_VOCABULARY else rows
        lengths = set(range(rows, padded + 1)) - widths
        heads += [stored_weight(m) for m in linears if m.out_features in lengths]
    if last and not heads and tables:
        heads += [stored_weight(m) for m in linears if m.out_features == largest][-1:]
    return [weight for weight in heads if weight is not None]


_SMALLEST_VOCABULARY = 256
"""Smaller tables are of positions, of token types or of modulations, and are not padded."""
