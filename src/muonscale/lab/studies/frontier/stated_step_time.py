"""Seconds of a training step by the model of `muonscale plan`: stated rates, counted work and bytes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from muonscale.errors import StudyError
from muonscale.lab.studies.frontier.config import FrontierSection
from muonscale.lab.studies.frontier.step_time import Assumption, can_share
from muonscale.lab.studies.study import Outcome

if TYPE_CHECKING:
    from muonscale.lab.estimate.activations import Activations
    from muonscale.lab.estimate.resolve import ResolvedPlan


class Stated:
    """Step times of the runs of a study, were they done on other devices.

    Args:
        section: the device and its rates.
        runs: finished ones; a run of each optimizer and batch size gives its configuration.
        sequence_length: tokens.
    """

    def __init__(self, section: FrontierSection, runs: list[Outcome], sequence_length: int) -> None:
        self._section = section
        self._length = sequence_length
        self._runs = {
            (str(o.run.coordinates["variant"]), o.run.config.train.batch_tokens): o for o in runs
        }
        self._facts: dict[tuple[str, int, int], dict[str, Any]] = {}
        self._activations: dict[tuple[str, int], Activations] = {}

    def seconds(self, optimizer: str, batch_tokens: int, devices: int) -> float:
        """Return the seconds of a step; infinite too where it does not fit into memory.

        Raises:
            StudyError: if no run of the optimizer has this batch size.
        """
        if not can_share(batch_tokens, devices, self._length):
            return math.inf
        facts = self.facts(optimizer, batch_tokens, devices)
        return facts["time"]["step"] if facts["memory"]["fits"] else math.inf

    def facts(self, optimizer: str, batch_tokens: int, devices: int) -> dict[str, Any]:
        """Return all that `muonscale plan --json` says of a step.

        Raises:
            StudyError: if no run of the optimizer has this batch size.
        """
        key = optimizer, batch_tokens, devices
        if key not in self._facts:
            self._facts[key] = self._estimate(*key)
        return self._facts[key]

    def _estimate(self, optimizer: str, batch_tokens: int, devices: int) -> dict[str, Any]:
        from muonscale.lab.estimate.estimate import estimate_plan
        from muonscale.lab.estimate.resolve import PlanRequest, resolve

        run = self._runs.get((optimizer, batch_tokens))
        if run is None:
            raise StudyError(
                f"no finished run of {optimizer} has a batch of {batch_tokens} tokens; finish one, with: muonscale study run"
            )
        section = self._section
        asked = PlanRequest(
            target=str(run.folder.path),
            devices=devices,
            device=section.throughput,
            mfu=section.mfu,
            bandwidth=None if section.bandwidth is None else section.bandwidth * 1e9,
            micro_batch=self._micro_batch(run, batch_tokens // devices),
        )
        planned = resolve(asked)
        return estimate_plan(planned, self._kept(optimizer, planned)).facts

    def _kept(self, optimizer: str, planned: ResolvedPlan) -> Activations:
        """Return the activations of a micro-batch: counted once for all batches and devices it serves."""
        from muonscale.lab.estimate.activations import activation_bytes

        key = optimizer, planned.workload.micro_tokens
        if key not in self._activations:
            found = activation_bytes(planned.shape, planned.placement.topology, planned.workload)
            self._activations[key] = found
        return self._activations[key]

    def _micro_batch(self, run: Outcome, share: int) -> int | None:
        """Return the largest divisor of a device's share that the run's micro-batch allows."""
        most = run.run.config.train.micro_batch_tokens
        if most is None:
            return None
        sequences = share // self._length
        allowed = range(1, min(most // self._length, sequences) + 1)
        return self._length * max(n for n in allowed if sequences % n == 0)

    def assumptions(self) -> list[Assumption]:
        """Return those of `muonscale plan` for all steps that were asked for, and our own."""
        section = self._section
        layouts = {facts["layout"]["layout"].partition("=")[0] for facts in self._facts.values()}
        large = sum(not facts["memory"]["fits"] for facts in self._facts.values())
        rows = [
            ("steps", f"computed for {section.throughput}, not measured", "as `muonscale plan`"),
            ("layout", ", ".join(sorted(layouts)), "parallel.* of the runs"),
            ("batches", f"shared as whole sequences of {self._length:,} tokens, as many on each device",
             "as `muonscale train` asks"),
            ("micro-batches", self._micro_batches(), "train.micro_batch_tokens of the runs"),
            ("step times", "exact: intervals hold the noise of the steps alone", "assumption"),
        ]  # fmt: skip
        if large:
            rows.append(
                (
                    "left out",
                    f"{large} of {len(self._facts)} combinations of optimizer, batch and devices that "
                    "do not fit into memory",
                    "`muonscale plan`; a smaller train.micro_batch_tokens needs less",
                )
            )
        own = [{"what": what, "value": value, "source": source} for what, value, source in rows]
        found = [row for facts in self._facts.values() for row in facts["assumptions"]]
        unique = {tuple(row.values()): row for row in found}
        return own + list(unique.values())

    def _micro_batches(self) -> str:
        given = {o.run.config.train.micro_batch_tokens for o in self._runs.values()}
        sizes = sorted(size for size in given if size is not None)
        said = [f"at most {size:,} tokens, the largest that divides the share" for size in sizes]
        return "; ".join(["the whole share of a device"] * (None in given) + said)
