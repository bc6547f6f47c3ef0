"""Shard a model over ranks with torch's own wrappers.

The result agrees with `muonscale.lab.parallel.placements.parameter_shardings`. With many ranks the
model is built on the meta device and filled from the first rank, layer by layer, so that with FSDP
no other rank allocates the whole model.
"""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from muonscale.errors import ConfigError
from muonscale.lab.config.sections import TrainSection
from muonscale.lab.models.moe.routers import keep_float32
from muonscale.lab.models.structure import decoder_layers, expert_modules, parameters_of
from muonscale.lab.parallel.experts import shard_experts
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.placements import check_model, expert_axis, tensor_styles
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.styles import parallel_styles
from muonscale.lab.parallel.topology import Topology
from muonscale.optim.distributed.dtensor import is_sharded


def parallelize(
    model: PreTrainedModel,
    source: PreTrainedModel | None,
    section: TrainSection,
    processes: Processes,
    precision: torch.dtype,
) -> Parallelized:
    """Shard a model over the ranks: a collective.

    Args:
        model: the model itself with one process, otherwise a model on the meta device; changed.
        source: on the first of several ranks, the model with the initial weights.
        section: activation checkpointing and compilation.
        processes: the processes of the run.
        precision: dtype of forward and backward passes; parameters stay float32.

    Raises:
        ConfigError: for a model that cannot be sharded under the topology.
    """
    topology = processes.topology
    keep_float32(model)
    if section.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(
                "train.activation_checkpointing=true: transformers does not support it for "
                f"model_type {model.config.model_type!r}"
            )
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable()
        else:  # its name in older releases; newer ones warn about it
            model.gradient_checkpointing_enable()
    if not processes.many:
        _compile(model, section)
        return Parallelized(model, model, precision)
    check_model(model, topology)
    builder = _Builder(model, source, processes, precision)
    for layer in decoder_layers(model):
        builder.build(layer)
    builder.build(model)
    _compile(model, section)
    return builder.finish()


def _compile(model: PreTrainedModel, section: TrainSection) -> None:
    if section.compile:
        for layer in decoder_layers(model):
            layer.forward = torch.compile(layer.forward)  # pyrefly: ignore [bad-assignment]


class _Meshes:
    """The device meshes of a topology, created at first use."""

    def __init__(self, topology: Topology, device: torch.device) -> None:
        self._topology, self._device = topology, device.type

    def _mesh(self, axes: dict[str, int]) -> DeviceMesh:
        return init_device_mesh(
            self._device, tuple(axes.values()), mesh_dim_names=tuple(axes.keys())
        )

    @cached_property
    def _dense(self) -> DeviceMesh:
        topology = self._topology
        axes = {"replicate": topology.replicas} if topology.data == "hsdp" else {}
        if topology.data_ranks > 1:
            axes["shard"] = topology.shards
        if topology.tensor > 1:
            axes["tensor"] = topology.tensor
        return self._mesh(axes)

    @cached_property
    def data(self) -> DeviceMesh:
        """Mesh of the ranks that read different data."""
        hybrid = self._topology.data == "hsdp"
        return self._dense["replicate", "shard"] if hybrid else self._dense["shard"]

    @cached_property
    def tensor(self) -> DeviceMesh:
        """Mesh of the ranks that share the matrices of a layer."""
        return self._dense["tensor"]

    @cached_property
    def _sparse(self) -> DeviceMesh:
        topology = self._topology
        return self._mesh({"expert_shard": topology.expert_shards, "expert": topology.expert})

    @cached_property
    def expert(self) -> DeviceMesh:
        """Mesh of the ranks with different experts."""
        return self._sparse["expert"]

    @cached_property
    def expert_shard(self) -> DeviceMesh:
        """Mesh of the ranks with the same experts."""
        return self._sparse["expert_shard"]


class _Builder:
    """Fills a model on the meta device and shards it, one part at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        source: PreTrainedModel | None,
        processes: Processes,
        precision: torch.dtype,
    ) -> None:
        self._model, self._source, self._processes = model, source, processes
        self._precision, self._topology = precision, processes.topology
        self._meshes = _Meshes(self._topology, processes.device)
        self._names = {module: name for name, module in model.named_modules()}
        self._filled: dict[Tensor, nn.Parameter] = {}
        self._ties = _ties(model)
        self._experts = expert_modules(model) if self._topology.expert > 1 else {}
        self._styles: dict[str, ParallelStyle] = {}
        if self._topology.tensor > 1:
            self._styles = parallel_styles(model, sequence=self._topology.sequence)

    def build(self, part: nn.Module) -> None:
        """Fill and shard a part of the model, except for modules that were built before."""
        for module in part.modules():
            self._fill(module)
        for module in part.modules():
            name = self._names[module]
            if name in self._styles:
                style = self._styles.pop(name)
                parallelize_module(module, self._meshes.tensor, style, src_data_rank=None)
            if name in self._experts:
                self._shard_experts(self._experts.pop(name))
        if part is self._model:
            # Tied parameters become one parameter again; their uses are sharded equally.
            for (module, leaf), *others in self._ties:
                for other, other_leaf in others:
                    setattr(other, other_leaf, getattr(module, leaf))
        if self._sharded:
            fully_shard(part, mesh=self._meshes.data, mp_policy=self._policy)

    def finish(self) -> Parallelized:
        """Return the sharded model."""
        model, topology = self._model, self._topology
        if topology.data == "ddp":
            return Parallelized(model, self._replicate(), self._precision)
        styles = tensor_styles(model) if topology.tensor > 1 else {}
        partial = parameters_of(model, [name for name, s in styles.items() if s == "partial"])
        return Parallelized(
            model,
            model,
            self._precision,
            casts=self._sharded,
            partial=partial,
            heads=self._meshes.tensor.get_group() if partial else None,
        )

    @property
    def _sharded(self) -> bool:
        return self._topology.data != "ddp" and self._topology.data_ranks > 1

    @property
    def _policy(self) -> MixedPrecisionPolicy:
        if self._precision == torch.float32:
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=self._precision, reduce_dtype=self._precision)

    def _fill(self, module: nn.Module) -> None:
        """Fill a module's own parameters and buffers with the values of the first rank."""
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                if parameter not in self._filled:
                    values = self._values(module, leaf, parameter)
                    self._filled[parameter] = nn.Parameter(values, parameter.requires_grad)
                setattr(module, leaf, self._filled[parameter])
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, leaf, self._values(module, leaf, buffer))

    def _values(self, module: nn.Module, leaf: str, like: Tensor) -> Tensor:
        values = torch.empty_like(like, device=self._processes.device)
        if self._source is not None:
            owner = self._source.get_submodule(self._names[module])
            values.copy_(getattr(owner, leaf).detach())
        dist.broadcast(values, 0)
        return values

    def _shard_experts(self, module: nn.Module) -> None:
        topology, number = self._topology, float(self._topology.data_ranks)
        shard_experts(module, self._meshes.expert)
        if topology.data == "ddp":
            # Its gradients are sums over the tokens of all ranks; the others are means.
            for parameter in module.parameters():
                parameter.register_hook(lambda gradient: gradient / number)
            return
        axes = {p: Shard(expert_axis(tuple(p.shape), topology)) for p in module.parameters()}
        fully_shard(
            module,
            mesh=self._meshes.expert_shard,
            mp_policy=self._policy,
            shard_placement_fn=axes.get,
        )
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(number)
        if topology.expert_shards > 1:  # with one, torch 2.13 would divide twice
            module.set_force_sum_reduction_for_comms(
                True
            )  # gloo supports no other reduction with a factor

    def _replicate(self) -> DistributedDataParallel:
        names = [name for name, p in self._model.named_parameters() if is_sharded(p)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self._model, names)
        names = inspect.signature(DistributedDataParallel).parameters
        # Newer releases warn about the old name. Buffers are equal on all ranks already.
        sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
        wrapped = DistributedDataParallel(self._model, **options)
        if self._precision == torch.bfloat16:
            wrapped.register_comm_hook(None, _reduce_in_bfloat16)
        return wrapped


def _reduce_in_bfloat16(state, bucket):  # without annotations, which torch would compare as strings
    """Reduce gradients in bfloat16 with torch's hook, whose own name torch refuses with gloo."""
    return bf16_compress_hook(state, bucket)


def _ties(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Return the uses (module, attribute) of every parameter that is used more than once."""
    uses: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            uses.setdefault(parameter, []).append((module, leaf))
    return [places for places in uses.values() if len(places) > 1]
