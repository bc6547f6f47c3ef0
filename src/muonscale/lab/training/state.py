"""What a run carries from step to step, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel

from muonscale.errors import CheckpointError
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training.attention import AttentionWatch
from muonscale.lab.training.checkpoint import load_facts, load_tensors, save_checkpoint
from muonscale.lab.training.noise_scale import NoiseScale
from muonscale.lab.training.router_balance import Routing
from muonscale.lab.training.spikes import Spikes
from muonscale.optim.muon import Muon


@dataclass
class TrainState:
    """Model, optimizer, what is done for routers, and position of a run."""

    forward: Parallelized
    optimizer: Muon
    routing: Routing
    facts: dict[str, Any]
    """What a continued run must have in common with this one: the data and the model."""
    step: int = 0
    """Optimizer steps done. Data order, schedule, random numbers and samples all follow from it."""
    attention: AttentionWatch | None = None
    """Hears attention, if anything of it is asked for."""
    spikes: Spikes = field(default_factory=Spikes)
    noise_scale: NoiseScale = field(default_factory=NoiseScale)

    @property
    def model(self) -> PreTrainedModel:
        """The model that is trained, as this rank has it."""
        return self.forward.model

    def save(
        self, root: Path, processes: Processes, *, keep: int, marked: Collection[int] = ()
    ) -> None:
        """Write a checkpoint of this step (see `save_checkpoint`): a collective of all ranks."""
        facts = {
            "step": self.step,
            "spikes": self.spikes.facts(),
            "noise_scale": self.noise_scale.facts(),
            **self.facts,
        }
        save_checkpoint(
            root, self.step, self._tensors(), facts, processes, keep=keep, marked=marked
        )

    def restore(self, folder: Path, processes: Processes) -> None:
        """Take over the state of a checkpoint, saved by any number of processes: a collective.

        Raises:
            CheckpointError: if it belongs to other data or another model.
        """
        saved = load_facts(folder)
        for key, value in self.facts.items():
            if saved.get(key) != value:
                raise CheckpointError(_other(key, folder, saved.get(key), value))
        tensors = self._tensors()
        load_tensors(folder, tensors, processes)
        set_optimizer_state_dict(self.model, self.optimizer, optim_state_dict=tensors["optimizer"])
        self.step = saved["step"]
        self.spikes.restore(saved.get("spikes"))
        self.noise_scale.restore(saved.get("noise_scale"))

    def _tensors(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }


def _other(key: str, folder: Path, saved: Any, now: Any) -> str:
    if isinstance(saved, dict) and isinstance(now, dict):
        changed = sorted(k for k in saved.keys() | now.keys() if saved.get(k) != now.get(k))
        detail = ", ".join(f"{k}: {saved.get(k)!r} then, {now.get(k)!r} now" for k in changed)
    else:
        detail = f"{saved} then, {now} now"
    return (
        f"checkpoint {folder} was trained on another {key} ({detail}); restore what it was trained "
        "on, or start a new run with run.path=FOLDER"
    )
