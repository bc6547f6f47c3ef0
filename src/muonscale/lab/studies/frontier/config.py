"""The configuration of a compute-time frontier: devices, and the source of step times."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from muonscale.errors import ConfigError
from muonscale.lab.config.sections import Section
from muonscale.lab.studies.config import check_rising

MEASURED = "measured"
MFU = 0.4
Devices = Annotated[int, Field(gt=0, le=4096)]


class FrontierSection(Section):
    """Keys of the compute-time frontier: `frontier.*`."""

    devices: Annotated[list[Devices], Field(min_length=1)] = [1, 2, 4, 8, 16, 32, 64]
    """Numbers of devices, in rising order."""
    throughput: str = MEASURED
    """`measured`: step times of the study's own runs; or a device that `muonscale plan` knows, such
    as `h100`: step times by the model of the plan."""
    mfu: Annotated[float, Field(gt=0, le=1)] = MFU
    """Share of the device's peak FLOP/s that forward and backward passes reach."""
    bandwidth: Annotated[float, Field(gt=0)] | None = None
    """GB per second of a device to other machines; the device's own when not given."""
    optimizer_work: Literal["divided", "repeated"] = "divided"
    """Whether the optimizer's work in measured step times is divided among the devices, as Muon's
    is under DDP and FSDP2, or repeated on each."""

    @field_validator("devices")
    @classmethod
    def _check_devices(cls, value: list[int]) -> list[int]:
        check_rising("frontier.devices", value)
        return value

    @field_validator("throughput")
    @classmethod
    def _check_throughput(cls, value: str) -> str:
        if value != MEASURED:
            from muonscale.lab.devices import find_device

            try:
                find_device(value)
            except ConfigError as error:
                raise ValueError(
                    f"frontier.throughput={value!r} is neither {MEASURED} nor a device: {error}"
                ) from None
        return value

    @model_validator(mode="after")
    def _check_keys(self) -> FrontierSection:
        if self.throughput == MEASURED:
            for key, default in (("mfu", MFU), ("bandwidth", None)):
                if getattr(self, key) != default:
                    raise ValueError(
                        f"frontier.{key}={getattr(self, key):g} is for a stated device, and "
                        f"frontier.throughput is {MEASURED}; set throughput to a device such as "
                        f"h100, or leave out {key}"
                    )
        elif self.optimizer_work != "divided":
            raise ValueError(
                f"frontier.optimizer_work={self.optimizer_work} is for measured step times, and "
                f"frontier.throughput is {self.throughput}, where parallel.* decides; leave it out"
            )
        return self
