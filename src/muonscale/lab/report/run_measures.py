"""What is drawn of runs: losses, the optimizer, speed, routing, attention, spectra."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeGuard

import numpy as np

from muonscale.lab.report.measures import Curves, Measure, chart_of
from muonscale.lab.report.page import Chart, Mark, Series
from muonscale.lab.report.run_data import Record, RunData, UnitT, column, names
from muonscale.optim.options import OPTIONS_OF, names_of

LAYERS = 8
"""Up to so many layers have a curve each."""

NATS = "loss (nats per token)"

SPECTRA = {
    "weight_svd_entropy": (
        "SVD entropy of weights",
        "SVD entropy (1: all singular values are equal)",
    ),
    "weight_stable_rank": ("Stable rank of weights", "stable rank"),
    "update_svd_entropy": (
        "SVD entropy of updates",
        "SVD entropy (1: all singular values are equal)",
    ),
    "update_stable_rank": ("Stable rank of updates", "stable rank"),
    "weight_spectral_norm": ("Spectral norm of weights", "largest singular value"),
    "weight_rms": ("Size of weights", "root mean square"),
}
"""Fields of `matrices` in a telemetry record: title and label of the axis."""

TRAINING = Measure(
    name="training-loss",
    title="Training loss",
    y_label=NATS,
    parts=lambda records: {"training": column(records, "loss")},
    noisy=True,
)

HELD_OUT = Measure(
    name="held-out-loss",
    title="Held-out loss",
    y_label=NATS,
    parts=lambda records: {"held out": column(records, "held_out_loss")},
    kind="eval",
    look="both",
)


def loss_charts(runs: Sequence[RunData], unit: UnitT) -> list[Chart]:
    """Return the losses: of one run training, held-out and baselines in one chart, else two charts."""
    charts = [chart_of(measure, runs, unit) for measure in (TRAINING, HELD_OUT)]
    found = [chart for chart in charts if chart is not None]
    if len(runs) == 1 and found:
        series = tuple(series for chart in found for series in chart.series)
        name = found[0].name.replace(TRAINING.name, "loss").replace(HELD_OUT.name, "loss")
        title = found[0].title.replace(TRAINING.title, "Loss").replace(HELD_OUT.title, "Loss")
        found = [replace(found[0], name=name, title=title, series=series)]
    marks = _baselines(runs)
    return [
        replace(chart, marks=marks, y_limits=_loss_limits(chart.series, marks)) for chart in found
    ]


def _baselines(runs: Sequence[RunData]) -> tuple[Mark, ...]:
    """Return the losses of n-grams, if they are the same for all runs that have them."""
    marks = []
    for name in ("unigram", "bigram"):
        values = column([run.result for run in runs if run.result], f"{name}_loss")
        if len(values) and np.ptp(values) < 1e-3:
            at = float(values[0])
            marks.append(Mark(axis="y", at=at, label=f"{name} {at:.3f}"))
    return tuple(marks)


def _loss_limits(series: Sequence[Series], marks: Sequence[Mark]) -> tuple[float, float] | None:
    """Return limits that cut a diverged run at one and a half times its start; None for all others."""
    values = [np.array(one.y) for one in series]
    known = [finite for value in values if len(finite := value[np.isfinite(value)])]
    if not known:
        return None
    levels = [mark.at for mark in marks]
    start = max([float(value[0]) for value in known] + levels)
    lowest = min([float(value.min()) for value in known] + levels)
    if max(float(value.max()) for value in known) <= 1.5 * start:
        return None
    return lowest - 0.05 * (1.5 * start - lowest), 1.5 * start


def _by_name(*keys: str) -> Callable[[list[Record]], Curves]:
    """Return a function that gives a curve for every name in the objects at `keys`."""
    return lambda records: {name: column(records, *keys, name) for name in names(records, *keys)}


def _learning_rates(records: list[Record]) -> Curves:
    """Return the rates of all groups; one curve where they are equal."""
    curves = dict(_by_name("lr")(records))
    rates = list(curves.values())
    if len(rates) > 1 and all(np.array_equal(rates[0], r, equal_nan=True) for r in rates):
        return {"all groups": rates[0]}
    return curves


def _whole_norm(records: list[Record]) -> np.ndarray:
    """Return the norm of all gradients together."""
    norms = list(_by_name("grad_norm")(records).values())
    return np.sqrt(np.sum(np.square(norms), axis=0)) if norms else np.full(len(records), np.nan)


def _update_rms(records: list[Record]) -> Curves:
    """Return the size of Muon updates; nothing of a run without Muon, which records zeros."""
    sizes = column(records, "update_rms")
    return {"Muon updates": sizes} if np.nansum(sizes) > 0 else {}


def _noise_scale(records: list[Record]) -> Curves:
    """Return the noise scale, and the batch of the steps in which it is known."""
    scale = column(records, "noise_scale", "scale")
    batch = np.where(np.isfinite(scale), column(records, "noise_scale", "tokens_big"), np.nan)
    return {"noise scale": scale, "batch": batch} if np.isfinite(scale).any() else {}


def _wanted_rms(runs: Sequence[RunData]) -> tuple[Mark, ...]:
    """Return the size that updates are scaled to, if it is the same for all runs."""
    known = [run.resolved.optimizer for run in runs if run.resolved is not None]
    scaled = [o for o in known if "rms" in names_of(OPTIONS_OF[o.rule])]
    wanted = {o.rms if o.scale in ("rms", "rms_exact") else None for o in scaled}
    rms = wanted.pop() if len(wanted) == 1 else None
    return () if rms is None else (Mark(axis="y", at=rms, label=f"optimizer.rms {rms:g}"),)


OPTIMIZER = (
    Measure(
        name="learning-rate",
        title="Learning rate",
        y_label="learning rate",
        parts=_learning_rates,
        caption_of_several="Of the first parameter group of each run.",
    ),
    Measure(
        name="gradient-norm",
        title="Gradient norm",
        y_label="norm before clipping",
        parts=_by_name("grad_norm"),
        whole=_whole_norm,
        noisy=True,
        log_y=True,
        caption_of_several="Of all parameters together.",
    ),
    Measure(
        name="update-rms",
        title="Size of Muon updates",
        y_label="RMS before the learning rate",
        parts=_update_rms,
        marks=_wanted_rms,
        noisy=True,
    ),
    Measure(
        name="noise-scale",
        title="Gradient noise scale",
        y_label="tokens",
        parts=_noise_scale,
        log_y=True,
        caption="Of running averages. A batch far below it wastes little data, one far above it "
        "takes hardly fewer steps.",
    ),
)

SPEED = (
    Measure(
        name="tokens-per-second",
        title="Speed",
        y_label="training tokens per second",
        parts=lambda records: {"speed": column(records, "tokens_per_second")},
        noisy=True,
    ),
    Measure(
        name="optimizer-share",
        title="The optimizer's share of a step",
        y_label="% of the time of a step",
        parts=lambda records: {
            "optimizer": 100 * column(records, "optimizer_ms") / column(records, "step_ms")
        },
        noisy=True,
    ),
)

ROUTING = (
    Measure(
        name="max-violation",
        title="Balance of the experts: MaxVio",
        y_label="(largest load - mean load) / mean load",
        parts=lambda records: {
            "mean over layers": column(records, "routing", "max_violation"),
            "worst layer": column(records, "routing", "max_violation_worst"),
        },
        noisy=True,
        caption_of_several="Mean over layers.",
    ),
    Measure(
        name="expert-shares",
        title="Busiest and quietest expert",
        y_label="part of a layer's choices",
        parts=lambda records: {
            "busiest": column(records, "routing", "busiest_share"),
            "quietest": column(records, "routing", "quietest_share"),
        },
        noisy=True,
        caption_of_several="The busiest.",
    ),
    Measure(
        name="dead-experts",
        title="Experts that no token of a step chose",
        y_label="experts, of all layers together",
        parts=lambda records: {"dead experts": column(records, "routing", "dead_experts")},
        noisy=True,
    ),
    Measure(
        name="routing-entropy",
        title="Entropy of affinities to experts",
        y_label="entropy, 1 is uniform",
        parts=lambda records: {"entropy": column(records, "routing", "entropy")},
        noisy=True,
    ),
)


def _layers(records: list[Record], key: str) -> np.ndarray:
    """Return a number of every layer, float64 [records, layers]; NaN in steps that were not heard."""
    heard = [record.get("attention") for record in records]
    found = [item.get(key) if isinstance(item, dict) else None for item in heard]
    count = max((len(item) for item in found if isinstance(item, list)), default=0)
    values = np.full((len(records), count), np.nan)
    for row, item in zip(values, found, strict=True):
        if isinstance(item, list) and len(item) == count:
            row[:] = column([{"layer": value} for value in item], "layer")
    return values


def _largest_logits(records: list[Record]) -> Curves:
    logits = _layers(records, "max_logit")
    count = logits.shape[1]
    if count <= LAYERS:
        return {f"layer {number}": logits[:, number] for number in range(count)}
    ordered = np.sort(logits, axis=1)
    return {
        "largest of the layers": ordered[:, -1],
        "median layer": ordered[:, count // 2],
        "smallest of the layers": ordered[:, 0],
    }


def _over_layers(records: list[Record], key: str) -> np.ndarray:
    values = _layers(records, key)
    return np.fmax.reduce(values, axis=1) if values.shape[1] else np.full(len(records), np.nan)


def _large_logits(records: list[Record]) -> Curves:
    """Return the share of logits above 100, if there ever were any."""
    share = _over_layers(records, "share_above_100")
    return {"worst layer": share} if np.nansum(share) > 0 else {}


ATTENTION = (
    Measure(
        name="attention-logits",
        title="Largest attention logits",
        y_label="largest logit of a step",
        parts=_largest_logits,
        whole=lambda records: _over_layers(records, "max_logit"),
        caption_of_several="Of all layers.",
    ),
    Measure(
        name="large-logits",
        title="Attention logits above 100",
        y_label="share of the logits of the worst layer",
        parts=_large_logits,
    ),
    Measure(
        name="qk-clip",
        title="Heads clipped by QK-clip",
        y_label="% of heads",
        parts=lambda records: {
            "clipped": 100
            * column(records, "qk_clip", "clipped")
            / column(records, "qk_clip", "heads")
        },
    ),
    Measure(
        name="qk-clip-gamma",
        title="Strongest QK-clip",
        y_label="smallest gamma of a step",
        parts=lambda records: {"gamma": column(records, "qk_clip", "smallest")},
    ),
)


def spectra(runs: Sequence[RunData]) -> list[Measure]:
    """Return the measures of telemetry: by kind of matrix, a chart for each kind if runs are several."""
    records = [record for run in runs for record in run.of_kind("telemetry")]
    of_groups = Measure(
        name="update-to-weight",
        title="Part of the weights that one step changes",
        y_label="norm of the update / norm of the weight",
        parts=lambda rs: {
            n: column(rs, "groups", n, "update_to_weight") for n in names(rs, "groups")
        },
        kind="telemetry",
        log_y=True,
        caption_of_several="Of the first parameter group.",
    )
    kinds = names(records, "matrices")
    shown = [[kind] for kind in kinds] if len(runs) > 1 else [kinds]
    return [_spectrum(field, some) for field in SPECTRA for some in shown if some] + [of_groups]


def _spectrum(field: str, kinds: Sequence[str]) -> Measure:
    title, y_label = SPECTRA[field]
    suffix, of = (
        (f"-{kinds[0]}", f": {kinds[0]}") if len(kinds) == 1 else ("", " by kind of matrix")
    )
    return Measure(
        name=field.replace("_", "-") + suffix,
        title=title + of,
        y_label=y_label,
        parts=lambda records: {k: column(records, "matrices", k, field) for k in kinds},
        kind="telemetry",
    )


def spike_steps(run: RunData, length: str) -> list[int]:
    """Return the steps at which the count of spikes of a length rose."""
    train = run.of_kind("train")
    counts = np.nan_to_num(column(train, "spikes", length))
    rises = np.diff(counts, prepend=0.0) > 0
    return [record["step"] for record, rose in zip(train, rises, strict=True) if rose]


def finite(value: object) -> TypeGuard[float]:
    """Return whether a value of JSON is a number."""
    return isinstance(value, int | float) and math.isfinite(value)
