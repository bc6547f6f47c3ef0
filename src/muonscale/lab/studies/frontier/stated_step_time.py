"""Seconds of a training step by the model of `muonscale plan`, from stated rates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from muonscale.errors import StudyError
from muonscale.lab.studies.frontier.config import FrontierSection
from muonscale.lab.studies.frontier.step_time import can_share
from muonscale.lab.studies.study import Outcome

if TYPE_CHECKING:
    from muonscale.lab.estimate.activations import Activations
    from muonscale.lab.estimate.assumptions import Assumption


class StatedStepTime:
    """Step times that the runs of a study would have on other devices.

    Args:
        section: the device and its rates.
        runs: finished runs; one of each optimizer and batch size gives its configuration.
        sequence_length: tokens of a sequence.
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
        """Return the seconds of a step; infinite also if it does not fit into memory.

        Raises:
            StudyError: if no run of the optimizer has this batch size.
        """
        if not can_share(batch_tokens, devices, self._length):
            return math.inf
        facts = self.facts(optimizer, batch_tokens, devices)
        return facts["time"]["step"] if facts["memory"]["fits"] else math.inf

    def facts(self, optimizer: str, batch_tokens: int, devices: int) -> dict[str, Any]:
        """Return the content of `muonscale plan --json` for a step.

        Raises:
            StudyError: if no run of the optimizer has this batch size.
        """
        from muonscale.lab.estimate.activations import activation_bytes
        from muonscale.lab.estimate.estimate import estimate_plan
        from muonscale.lab.estimate.resolve import PlanRequest, resolve

        key = optimizer, batch_tokens, devices
        if key in self._facts:
            return self._facts[key]
        run = self._runs.get((optimizer, batch_tokens))
        if run is None:
            raise StudyError(
                f"no finished run of {optimizer} has a batch of {batch_tokens} tokens; finish one "
                "with: muonscale study run"
            )
        section = self._section
        request = PlanRequest(
            target=str(run.folder.path),
            devices=devices,
            device=section.throughput,
            mfu=section.mfu,
            bandwidth=None if section.bandwidth is None else section.bandwidth * 1e9,
            micro_batch=self._micro_batch(run, batch_tokens // devices),
        )
        planned = resolve(request)
        # Activations depend on the micro-batch alone: all batches and devices it serves share them.
        kept = optimizer, planned.workload.micro_tokens
        if kept not in self._activations:
            self._activations[kept] = activation_bytes(
                planned.shape, planned.placement.topology, planned.workload
            )
        self._facts[key] = estimate_plan(planned, self._activations[kept])
        return self._facts[key]

    def _micro_batch(self, run: Outcome, share: int) -> int | None:
        """Return the largest divisor of a device's share that the run's micro-batch allows."""
        most = run.run.config.train.micro_batch_tokens
        if most is None:
            return None
        sequences = share // self._length
        allowed = range(1, min(most // self._length, sequences) + 1)
        return self._length * max(n for n in allowed if sequences % n == 0)

    def assumptions(self) -> list[Assumption]:
        """Return the assumptions of `muonscale plan` for all steps asked for, and our own."""
        layouts = {facts["layout"]["layout"].partition("=")[0] for facts in self._facts.values()}
        large = sum(not facts["memory"]["fits"] for facts in self._facts.values())
        given = {o.run.config.train.micro_batch_tokens for o in self._runs.values()}
        sizes = [
            f"at most {size:,} tokens, the largest that divides the share"
            for size in sorted(size for size in given if size is not None)
        ]
        micro = ["the whole share of a device"] * (None in given) + sizes
        rows = [
            ("steps", f"computed for {self._section.throughput}, not "
                "measured", "as in `muonscale plan`"),
            ("layout", ", ".join(sorted(layouts)), "parallel.* of the runs"),
            ("batches", f"divided into whole sequences of {self._length:,} tokens, equally many on "
                "each device",
             "as in `muonscale train`"),
            ("micro-batches", "; ".join(micro), "train.micro_batch_tokens of the runs"),
            ("step times", "exact: intervals include the noise of the steps alone", "assumption"),
        ]  # fmt: skip
        if large:
            count = f"{large} of {len(self._facts)} combinations of optimizer, batch and devices"
            less = "`muonscale plan`; a smaller train.micro_batch_tokens needs less"
            rows.append(("left out", f"{count} that do not fit into memory", less))
        own = [{"what": what, "value": value, "source": source} for what, value, source in rows]
        found = [row for facts in self._facts.values() for row in facts["assumptions"]]
        return own + list({tuple(row.values()): row for row in found}.values())
