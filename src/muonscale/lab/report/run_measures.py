"""The measures of a run: losses, optimizer, speed, routing, attention, spectra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from muonscale.lab.report.measure_charts import (
    TITLE_SUFFIXES,
    X_LABELS,
    Curves,
    Measure,
    chart_of,
    time_unit,
)
from muonscale.lab.report.page import Chart, ChartViews, Mark, Numbers, Series
from muonscale.lab.report.run_data import Record, RunData, UnitT, column, is_finite, names
from muonscale.optim.options import OPTIONS_OF, names_of

LAYERS = 8
"""Up to this many layers have a curve each."""

NATS = "loss (nats per token)"

ENTROPY = "SVD entropy (1: all singular values are equal)"
SPECTRA = {
    "weight_svd_entropy": ("SVD entropy of weights", ENTROPY),
    "weight_stable_rank": ("Stable rank of weights", "stable rank"),
    "update_svd_entropy": ("SVD entropy of updates", ENTROPY),
    "update_stable_rank": ("Stable rank of updates", "stable rank"),
    "weight_spectral_norm": ("Spectral norm of weights", "largest singular value"),
    "weight_rms": ("Size of weights", "root mean square"),
}
"""Fields of `matrices` in a telemetry record, with title and y label of the chart."""


def _read(paths: dict[str, str]) -> Callable[[list[Record]], Curves]:
    """Return a function that reads curves by their paths in a record, keys joined by dots."""
    return lambda records: {n: column(records, *path.split(".")) for n, path in paths.items()}


def _percent(name: str, part: str, whole: str) -> Callable[[list[Record]], Curves]:
    """Return a function that reads one number in percent of another, by their paths."""

    def read(records: list[Record]) -> Curves:
        return {name: 100 * column(records, *part.split(".")) / column(records, *whole.split("."))}

    return read


def _read_all(*keys: str) -> Callable[[list[Record]], Curves]:
    """Return a function that reads one curve for every name in the objects at `keys`."""
    return lambda records: {name: column(records, *keys, name) for name in names(records, *keys)}


TRAINING = Measure(
    "training-loss", "Training loss", NATS, _read({"training": "loss"}), noisy=True, faint=True
)
VALIDATION = Measure(
    "validation-loss",
    "Validation loss",
    NATS,
    _read({"validation": "validation_loss"}),
    kind="eval",
    look="both",
)


def loss_views(runs: Sequence[RunData]) -> ChartViews | None:
    """Return the losses of runs against tokens, steps, time and FLOPs; None if there are none."""
    charts = [(unit, loss_chart(runs, unit)) for unit in X_LABELS]
    views = tuple((unit, chart) for unit, chart in charts if chart.series)
    return ChartViews(views=views) if views else None


def loss_chart(runs: Sequence[RunData], unit: UnitT) -> Chart:
    """Return training loss, validation loss and baselines of runs in one chart.

    Losses of runs with different tokenizers are in bits per byte. Those of a training step are then
    converted with the bytes per token of the validation split, and a run for which these are
    unknown has no curve.
    """
    per_byte = have_different_tokenizers(runs)
    factors = {run.label: bytes_factor(run) if per_byte else 1.0 for run in runs}
    series: list[Series] = []
    captions: list[str] = []
    for measure, what in ((TRAINING, "training"), (VALIDATION, "validation")):
        chart = chart_of(measure, runs, unit)
        for one in () if chart is None else chart.series:
            run = one.color_group if len(runs) > 1 else runs[0].label
            if (factor := factors[run]) is not None:
                renamed = one if len(runs) == 1 else _of_run(one, run, what)
                series.append(_scaled(renamed, factor))
        captions += [chart.caption] if chart is not None and chart.caption else []
    if len(runs) > 1:
        captions.append("Lines with dots are validation losses.")
    if per_byte:
        captions.append(
            "The runs have different tokenizers. Training losses are converted to bits per byte "
            "with the bytes per token of the validation split."
        )
    chart = Chart(
        name="loss" if unit == "tokens" else f"loss-{unit.lower()}",
        title="Loss" + TITLE_SUFFIXES[unit],
        x_label=X_LABELS[unit].format(time_unit(runs)[0]),
        y_label="loss (bits per byte)" if per_byte else NATS,
        series=tuple(series),
        legend="series" if len(runs) == 1 else "groups",
        caption=" ".join(captions),
    )
    return _with_baselines(chart, () if per_byte else runs)


def have_different_tokenizers(runs: Sequence[RunData]) -> bool:
    """Return whether a token is not the same in all runs, as far as their folders tell."""
    digests = [run.tokenizer_digest for run in runs]
    if all(digests):
        return len(set(digests)) > 1
    settings = {
        (run.setting("data", "tokenizer"), run.setting("data", "vocab_size")) for run in runs
    }
    return len(settings) > 1


def bytes_factor(run: RunData) -> float | None:
    """Return the bits per byte of a run for each nat per token; None if that is unknown."""
    for record in (run.result, *reversed(run.of_kind("eval"))):
        loss, bits = record.get("validation_loss"), record.get("bits_per_byte")
        if is_finite(loss) and is_finite(bits) and loss:
            return bits / loss
    return None


def _of_run(series: Series, run: str, what: str) -> Series:
    """Return a curve under a name that says of which run it is, and what."""
    what = f"{what}, single steps" if series.kind == "faint" else what
    return replace(series, name=f"{run}, {what}", group=run)


def _scaled(series: Series, factor: float) -> Series:
    """Return a curve with all y times a factor."""

    def times(values: Numbers) -> Numbers:
        return values if factor == 1 else tuple(factor * value for value in values)

    smoothings = tuple((kind, times(y)) for kind, y in series.smoothings)
    return replace(series, y=times(series.y), smoothings=smoothings)


def _with_baselines(chart: Chart, runs: Sequence[RunData]) -> Chart:
    """Mark the losses of n-grams if all runs that have them agree, and cut off diverged losses.

    The y axis then ends at one and a half times the loss at the start.
    """
    marks = []
    for name in ("unigram", "bigram"):
        values = column([run.result for run in runs if run.result], f"{name}_loss")
        if len(values) and np.ptp(values) < 1e-3:
            at = float(values[0])
            marks.append(Mark(axis="y", at=at, label=f"{name} {at:.3f}"))
    chart = replace(chart, marks=tuple(marks))
    curves = [np.array(series.y) for series in chart.series]
    curves = [finite for curve in curves if len(finite := curve[np.isfinite(curve)])]
    if not curves:
        return chart
    levels = [mark.at for mark in marks]
    start = max([float(curve[0]) for curve in curves] + levels)
    lowest = min([float(curve.min()) for curve in curves] + levels)
    if max(float(curve.max()) for curve in curves) <= 1.5 * start:
        return chart
    return replace(chart, y_limits=(lowest - 0.05 * (1.5 * start - lowest), 1.5 * start))


def _learning_rates(records: list[Record]) -> Curves:
    """Return the learning rates of all groups, as one curve if they are equal."""
    curves = _read_all("lr")(records)
    rates = list(curves.values())
    if len(rates) > 1 and all(np.array_equal(rates[0], r, equal_nan=True) for r in rates):
        return {"all groups": rates[0]}
    return curves


def _whole_norm(records: list[Record]) -> np.ndarray:
    """Return the norm of all gradients together."""
    norms = list(_read_all("grad_norm")(records).values())
    return np.sqrt(np.sum(np.square(norms), axis=0)) if norms else np.full(len(records), np.nan)


def _update_rms(records: list[Record]) -> Curves:
    """Return the size of Muon updates. A run without Muon records zeros and has no curve."""
    sizes = column(records, "update_rms")
    return {"Muon updates": sizes} if np.nansum(sizes) > 0 else {}


def _noise_scale(records: list[Record]) -> Curves:
    """Return the noise scale and, for the steps that have one, the batch size."""
    scale = column(records, "noise_scale", "scale")
    batch = np.where(np.isfinite(scale), column(records, "noise_scale", "tokens_big"), np.nan)
    return {"noise scale": scale, "batch": batch} if np.isfinite(scale).any() else {}


def _target_rms(runs: Sequence[RunData]) -> tuple[Mark, ...]:
    """Mark the RMS that updates are scaled to, if it is the same for all runs."""
    known = [run.resolved.optimizer for run in runs if run.resolved is not None]
    scaled = [o for o in known if "rms" in names_of(OPTIONS_OF[o.rule])]
    targets = {o.rms if o.scale in ("rms", "rms_exact") else None for o in scaled}
    rms = targets.pop() if len(targets) == 1 else None
    return () if rms is None else (Mark(axis="y", at=rms, label=f"optimizer.rms {rms:g}"),)


OPTIMIZER = (
    Measure(
        "learning-rate",
        "Learning rate",
        "learning rate",
        _learning_rates,
        caption_of_several="The first parameter group of each run.",
    ),
    Measure(
        "gradient-norm",
        "Gradient norm",
        "norm before clipping",
        _read_all("grad_norm"),
        whole=_whole_norm,
        noisy=True,
        log_y=True,
        caption_of_several="All parameters together.",
    ),
    Measure(
        "update-rms",
        "Size of Muon updates",
        "RMS before the learning rate",
        _update_rms,
        marks=_target_rms,
        noisy=True,
    ),
    Measure(
        "noise-scale",
        "Gradient noise scale",
        "tokens",
        _noise_scale,
        log_y=True,
        caption="Estimated from running averages. A batch far below the noise scale wastes little "
        "data; one far above it takes hardly fewer steps.",
    ),
)

SPEED = (
    Measure(
        "tokens-per-second",
        "Speed",
        "training tokens per second",
        _read({"speed": "tokens_per_second"}),
        noisy=True,
    ),
    Measure(
        "mfu",
        "MFU",
        "% of the peak FLOP/s of the GPUs",
        lambda records: {"MFU": 100 * column(records, "mfu")},
        noisy=True,
    ),
    Measure(
        "optimizer-share",
        "The optimizer's share of a step",
        "% of the time of a step",
        _percent("optimizer", "optimizer_ms", "step_ms"),
        noisy=True,
    ),
)

ROUTING = (
    Measure(
        "max-violation",
        "Balance of the experts: MaxVio",
        "(largest load - mean load) / mean load",
        _read(
            {
                "mean over layers": "routing.max_violation",
                "worst layer": "routing.max_violation_worst",
            }
        ),
        noisy=True,
        caption_of_several="Mean over layers.",
    ),
    Measure(
        "expert-shares",
        "Busiest and quietest expert",
        "part of a layer's choices",
        _read({"busiest": "routing.busiest_share", "quietest": "routing.quietest_share"}),
        noisy=True,
        caption_of_several="The busiest expert.",
    ),
    Measure(
        "dead-experts",
        "Experts that no token of a step chose",
        "experts in all layers together",
        _read({"dead experts": "routing.dead_experts"}),
        noisy=True,
    ),
    Measure(
        "routing-entropy",
        "Entropy of affinities to experts",
        "entropy, 1 is uniform",
        _read({"entropy": "routing.entropy"}),
        noisy=True,
    ),
)


def _layers(records: list[Record], key: str) -> np.ndarray:
    """Return a number of every layer, float64 [records, layers]; NaN where none is recorded."""
    attention = [record.get("attention") for record in records]
    lists = [item.get(key) if isinstance(item, dict) else None for item in attention]
    count = max((len(item) for item in lists if isinstance(item, list)), default=0)
    values = np.full((len(records), count), np.nan)
    for row, item in zip(values, lists, strict=True):
        if isinstance(item, list) and len(item) == count:
            row[:] = column([{"layer": value} for value in item], "layer")
    return values


def _over_layers(records: list[Record], key: str) -> np.ndarray:
    values = _layers(records, key)
    return np.fmax.reduce(values, axis=1) if values.shape[1] else np.full(len(records), np.nan)


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


def _large_logits(records: list[Record]) -> Curves:
    """Return the share of logits above 100; no curve if it is always 0."""
    share = _over_layers(records, "share_above_100")
    return {"worst layer": share} if np.nansum(share) > 0 else {}


ATTENTION = (
    Measure(
        "attention-logits",
        "Largest attention logits",
        "largest logit of a step",
        _largest_logits,
        whole=lambda records: _over_layers(records, "max_logit"),
        caption_of_several="The largest of all layers.",
    ),
    Measure(
        "large-logits",
        "Attention logits above 100",
        "share of the logits of the worst layer",
        _large_logits,
    ),
    Measure(
        "qk-clip",
        "Heads clipped by QK-clip",
        "% of heads",
        _percent("clipped", "qk_clip.clipped", "qk_clip.heads"),
    ),
    Measure(
        "qk-clip-gamma",
        "Strongest QK-clip",
        "smallest gamma of a step",
        _read({"gamma": "qk_clip.smallest"}),
    ),
)


def spectra(runs: Sequence[RunData]) -> list[Measure]:
    """Return the measures of telemetry. Several runs have a chart for every kind of matrix."""
    records = [record for run in runs for record in run.of_kind("telemetry")]
    kinds = names(records, "matrices")
    charts = [[kind] for kind in kinds] if len(runs) > 1 else [kinds] if kinds else []
    measures = [
        Measure(
            field.replace("_", "-") + (f"-{some[0]}" if len(some) == 1 else ""),
            f"{title}: {some[0]}" if len(some) == 1 else f"{title} by kind of matrix",
            y_label,
            _read({kind: f"matrices.{kind}.{field}" for kind in some}),
            kind="telemetry",
        )
        for field, (title, y_label) in SPECTRA.items()
        for some in charts
    ]
    update_to_weight = Measure(
        "update-to-weight",
        "Update size relative to the weights",
        "norm of the update / norm of the weight",
        lambda records: {
            name: column(records, "groups", name, "update_to_weight")
            for name in names(records, "groups")
        },
        kind="telemetry",
        log_y=True,
        caption_of_several="The first parameter group.",
    )
    return [*measures, update_to_weight]


def spike_steps(run: RunData, norm: str) -> list[int]:
    """Return the steps at which the number of spikes of a norm rose."""
    train = run.of_kind("train")
    counts = np.nan_to_num(column(train, "spikes", norm))
    rises = np.diff(counts, prepend=0.0) > 0
    return [record["step"] for record, rose in zip(train, rises, strict=True) if rose]
