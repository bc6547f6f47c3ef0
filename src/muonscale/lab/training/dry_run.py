"""Describe a run without running it. Nothing is written, and the model is on the meta device."""

from __future__ import annotations

from transformers import PreTrainedConfig

from muonscale.lab.config.load import Config
from muonscale.lab.console import si_text
from muonscale.lab.data.tokenizer import load_tokenizer
from muonscale.lab.models.adapter import add_adapter
from muonscale.lab.models.build import meta_model
from muonscale.lab.models.config import model_config
from muonscale.lab.models.flops import flops_per_token
from muonscale.lab.models.pretrained import weight_files
from muonscale.lab.models.structure import count_parameters
from muonscale.lab.parallel.topology import Topology
from muonscale.lab.training.attention import plan_attention
from muonscale.lab.training.average import build_average
from muonscale.lab.training.checkpoint import steps_to_keep
from muonscale.lab.training.load_optimizer_state import check_state_file
from muonscale.lab.training.noise_scale import check_noise_scale
from muonscale.lab.training.param_groups import plan_transfer
from muonscale.lab.training.router_balance import plan_routing
from muonscale.lab.training.schedule import (
    build_option_schedule,
    check_schedule,
    multiplier,
    spans,
)
from muonscale.lab.training.setup import build_optimizer, model_shape
from muonscale.lab.training.trackers.registry import check_trackers
from muonscale.optim.parameters.report import grouping_report
from muonscale.transfer.apply import Parametrization

BARS, SKETCH_WIDTH = "▁▂▃▄▅▆▇█", 40


def dry_run(config: Config) -> str:
    """Return model size, tokens, FLOPs, schedule and parameter groups as text.

    Raises:
        MuonscaleError: as training would for the configuration, the model and the groups.
    """
    check_schedule(config)
    if config.optimizer.state is not None:
        check_state_file(config.optimizer.state)
    steps_to_keep(config)
    check_trackers(config)
    check_noise_scale(config, Topology())
    shape = planned_shape(config)
    model = meta_model(shape)
    add_adapter(model, config.adapter, config.run.seed)
    plan_routing(model, config.routing, spans(config.schedule, config.timeline))
    plan_attention(model, config)
    size = count_parameters(model)
    per_token = flops_per_token(shape, model, config.data.sequence_length)
    tokens = config.timeline.tokens_before(config.steps)
    if config.adapter.rank is not None:
        flops = "not counted: frozen weights get no gradient"
    elif per_token is None:
        flops = "not counted: the configuration does not say how many experts a token uses"
    else:
        whole = si_text(per_token * tokens)
        flops = f"{si_text(per_token)} per token, {whole} in all (forward and backward)"
    last = max(1, SKETCH_WIDTH - 1)
    steps = [number * (config.steps - 1) // last for number in range(SKETCH_WIDTH)]
    values = [multiplier(config.schedule, step, config.timeline) for step in steps]
    sketch = "".join(BARS[round(value * (len(BARS) - 1))] for value in values)
    transfer = plan_transfer(config, shape)
    optimizer = build_optimizer(model, config.optimizer, transfer=transfer)
    build_option_schedule(optimizer, config)
    build_average(model, config)
    groups = grouping_report(optimizer.param_groups)
    return "\n".join(
        [
            f"model      {size.total:,} parameters, {size.without_embeddings:,} without embeddings "
            f"and head, vocabulary {shape.vocab_size:,}",
            f"tokens     {config.steps} steps of {config.timeline.described_batches}: {tokens:,}",
            f"FLOPs      {flops}",
            f"schedule   {config.schedule.name} {sketch} peak {config.optimizer.lr:g}",
            *_stages(config),
            *_options(config),
            "",
            groups.table(full=False),
            groups.summary(),
            *transfer_lines(transfer),
        ]
    )


def transfer_lines(transfer: Parametrization | None, *, full: bool = False) -> list[str]:
    """Return the multipliers as lines of a report; none without transfer."""
    return [] if transfer is None else ["", transfer.table(full=full), transfer.summary()]


def planned_shape(config: Config) -> PreTrainedConfig:
    """Return the Hugging Face configuration of the model, before its tokenizer is trained.

    The weights to start from are not read, but must exist.
    """
    if config.model.weights is not None:
        weight_files(config.model.weights)
    length, name = config.data.sequence_length, config.data.tokenizer
    if name is None:
        size = config.data.vocab_size
        return model_config(
            config.model, vocab_size=size, sequence_length=length, bos_id=0, eos_id=0
        )
    return model_shape(config, load_tokenizer(name, own_begin=config.data.has_chats))


def _options(config: Config) -> list[str]:
    """Return a line for every scheduled option: its value, or multiple, at every point."""
    lines = []
    for key, points in config.schedule.options.items():
        at = (f"{p.value:g}" if p.times is None else f"{p.times:g} times" for p in points)
        places = (p.at if p.at == "end" else f"{p.at:g}" for p in points)
        listed = ", ".join(f"{x} at {place}" for x, place in zip(at, places, strict=True))
        lines.append(f"option     {key}: {listed}")
    return lines


def _stages(config: Config) -> list[str]:
    """Return a line for every stage, if there are stages: steps, tokens, learning rates, data."""
    if not config.schedule.stages:
        return []
    peak, lines = config.optimizer.lr, []
    for number, span in enumerate(spans(config.schedule, config.timeline), 1):
        first, last = (config.timeline.tokens_before(step) for step in (span.first, span.end))
        line = (
            f"stage {number}    steps {span.first:,} to {span.end:,}, tokens {first:.4g} to "
            f"{last:.4g}: lr {peak * span.low:.3g} to {peak * span.stage.peak:.3g} in "
            f"{span.warmup} steps, {span.stage.name} to {peak * span.high:.3g}"
        )
        if config.data.mixture is not None:
            weights = config.data.weights if span.stage.weights is None else span.stage.weights
            total = sum(weights.values())
            shares = (f"{100 * w / total:.3g} % {name}" for name, w in weights.items() if w)
            line += "; " + ", ".join(shares)
        lines.append(line)
    return lines
