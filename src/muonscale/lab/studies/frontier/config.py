"""What a compute-time frontier is asked: devices, and where the seconds of a step come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from muonscale.errors import ConfigError
from muonscale.lab.config.sections import Section

MEASURED = "measured"
MFU = 0.4
Devices = Annotated[int, Field(gt=0, le=4096)]


class FrontierSection(Section):
    """Keys of the compute-time frontier: `frontier.*`."""

    devices: Annotated[list[Devices], Field(min_length=1)] = [1, 2, 4, 8, 16, 32, 64]
    """Counts of devices, rising."""
    throughput: str = MEASURED
    """`measured`: step times of the study's own runs; else a device that `muonscale plan` knows, such
    as `h100`: step times by the plan's model."""
    mfu: Annotated[float, Field(gt=0, le=1)] = MFU
    """Part of the device's peak that forward and backward passes reach."""
    bandwidth: Annotated[float, Field(gt=0)] | None = None
    """GB per second of a device to other machines; the device's own when not given."""
    optimizer_work: Literal["divided", "repeated"] = "divided"
    """Of measured step times: whether the optimizer's work is divided among the devices, as Muon's is
    here under DDP and FSDP2, or repeated on each."""

    @field_validator("devices")
    @classmethod
    def _rising(cls, value: list[int]) -> list[int]:
        if sorted(set(value)) != value:
            raise ValueError(f"frontier.devices={value} must rise from one to the next")
        return value

    @field_validator("throughput")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != MEASURED:
            from muonscale.lab.estimate.devices import find_device

            try:
                find_device(value)
            except ConfigError as error:
                raise ValueError(
                    f"frontier.throughput={value!r} is neither {MEASURED} nor a device: {error}"
                ) from None
        return value

    @model_validator(mode="after")
    def _keys_that_count(self) -> FrontierSection:
        measured = self.throughput == MEASURED
        given = {"mfu": self.mfu != MFU, "bandwidth": self.bandwidth is not None}
        for key, changed in given.items():
            if measured and changed:
                raise ValueError(
                    f"frontier.{key}={getattr(self, key):g} is of a stated device, and "
                    f"frontier.throughput is {MEASURED}; give it a device, such as h100, or leave out {key}"
                )
        if not measured and self.optimizer_work != "divided":
            raise ValueError(
                f"frontier.optimizer_work={self.optimizer_work} is of measured step times, and "
                f"frontier.throughput is {self.throughput}: its optimizer is arranged as parallel.* says; leave it out"
            )
        return self
