"""The state that a run carries from step to step, and its checkpoints."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
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
from muonscale.lab.training.attention import AttentionMonitor
from muonscale.lab.training.average import WeightAverage
from muonscale.lab.training.background_save import BackgroundSaver
from muonscale.lab.training.checkpoint import load_facts, load_tensors, save_checkpoint
from muonscale.lab.training.noise_scale import NoiseScale
from muonscale.lab.training.router_balance import RouterBalance
from muonscale.lab.training.spikes import Spikes
from muonscale.optim.muon import Muon
from muonscale.optim.option_schedule import OptionSchedule


@dataclass
class TrainState:
    """Model, optimizer, router balance and position of a run."""

    forward: Parallelized
    optimizer: Muon
    routing: RouterBalance
    facts: dict[str, Any]
    """Data and model, which must be the same in a resumed run."""
    step: int = 0
    """Optimizer steps done. Data order, schedule, random numbers and samples follow from it."""
    attention: AttentionMonitor | None = None
    """Records attention logits, if they are needed."""
    spikes: Spikes = field(default_factory=Spikes)
    noise_scale: NoiseScale = field(default_factory=NoiseScale)
    options: OptionSchedule | None = None
    """Sets scheduled options of the optimizer, if there are any."""
    average: WeightAverage | None = None
    """The average of the weights, if there is one."""

    @property
    def model(self) -> PreTrainedModel:
        """The trained model on this rank."""
        return self.forward.model

    def save(
        self,
        root: Path,
        processes: Processes,
        *,
        keep: int,
        permanent: Collection[int] = (),
        background: BackgroundSaver | None = None,
    ) -> None:
        """Write a checkpoint of this step (see `save_checkpoint`): a collective of all ranks.

        With a background saver it only begins to be written.
        """
        facts = {
            "step": self.step,
            "spikes": asdict(self.spikes),
            "noise_scale": asdict(self.noise_scale),
            "averaged": 0 if self.average is None else self.average.count,
            **self.facts,
        }
        tensors = self._tensors()
        if background is None:
            save_checkpoint(
                root, self.step, tensors, facts, processes, keep=keep, permanent=permanent
            )
        else:
            background.save(root, self.step, tensors, facts, keep=keep, permanent=permanent)

    def restore(self, folder: Path, processes: Processes) -> None:
        """Restore a checkpoint, saved by any number of processes: a collective.

        Raises:
            CheckpointError: if it was trained on other data or is of another model.
        """
        saved = load_facts(folder)
        for key, value in self.facts.items():
            if saved.get(key) != value:
                raise CheckpointError(
                    f"checkpoint {folder} was trained on another {key} "
                    f"({_differences(saved.get(key), value)}); restore what it was trained on, or "
                    "start a new run with run.path=FOLDER"
                )
        if self.average is not None and saved["averaged"]:
            self.average.count = saved["averaged"]
            self.average.allocate()
        tensors = self._tensors()
        load_tensors(folder, tensors, processes)
        set_optimizer_state_dict(self.model, self.optimizer, optim_state_dict=tensors["optimizer"])
        self.step = saved["step"]
        self.spikes = Spikes(**saved["spikes"])
        self.noise_scale = NoiseScale(**saved["noise_scale"])

    def _tensors(self) -> dict[str, Any]:
        tensors: dict[str, Any] = {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }
        if self.average is not None and self.average.tensors:
            tensors["average"] = self.average.tensors
        return tensors


def _differences(saved: Any, now: Any) -> str:
    if not (isinstance(saved, dict) and isinstance(now, dict)):
        return f"{saved} then, {now} now"
    changed = sorted(k for k in saved.keys() | now.keys() if saved.get(k) != now.get(k))
    return ", ".join(f"{k}: {saved.get(k)!r} then, {now.get(k)!r} now" for k in changed)
