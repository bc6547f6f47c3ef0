"""What a run would be, without running it: nothing is written, the model is on the meta device."""

from __future__ import annotations

from transformers import PreTrainedConfig

from muonscale.lab.config import Config, dump_config
from muonscale.lab.data.tokenizer import load_tokenizer
from muonscale.lab.models.build import count_parameters, flops_per_token, meta_model, model_config
from muonscale.lab.training.routing import plan_routing
from muonscale.lab.training.schedule import check_schedule, multiplier
from muonscale.lab.training.setup import build_optimizer, model_shape
from muonscale.optim.groups import routing_report

BARS = "▁▂▃▄▅▆▇█"


def dry_run(config: Config) -> str:
    """Return the resolved configuration, model size, tokens, FLOPs, schedule and routing as text.

    Raises:
        MuonscaleError: as training would for the configuration, the model and the routing.
    """
    check_schedule(config.schedule, config.steps)
    shape = planned_shape(config)
    model = meta_model(shape)
    plan_routing(model, config.routing, config.steps)
    size = count_parameters(model)
    flops = flops_per_token(shape, model, config.data.sequence_length)
    tokens = config.steps * config.train.batch_tokens
    routing = routing_report(build_optimizer(model, config.optimizer).param_groups)
    return "\n".join(
        [
            dump_config(config),
            f"model      {size.total:,} parameters, {size.without_embeddings:,} without embeddings "
            f"and head, vocabulary {shape.vocab_size:,}",
            f"tokens     {config.steps} steps x {config.train.batch_tokens:,} = {tokens:,}",
            f"FLOPs      {_flops(flops, tokens)}",
            f"schedule   {config.schedule.name} {_sketch(config)} peak {config.optimizer.lr:g}",
            "",
            routing.table(full=False),
            routing.summary(),
        ]
    )


def planned_shape(config: Config) -> PreTrainedConfig:
    """Return the model's configuration; the ids of a tokenizer yet to be trained are known."""
    length, name = config.data.sequence_length, config.data.tokenizer
    if name is None:
        size = config.data.vocab_size
        return model_config(
            config.model, vocab_size=size, sequence_length=length, bos_id=0, eos_id=0
        )
    return model_shape(config, load_tokenizer(name))


def _flops(per_token: int | None, tokens: int) -> str:
    if per_token is None:
        return "not counted: the model does not say how many experts a token meets"
    return f"{per_token:.3e} per token, {per_token * tokens:.3e} in all (forward and backward)"


def _sketch(config: Config, width: int = 40) -> str:
    steps = [i * (config.steps - 1) // max(1, width - 1) for i in range(width)]
    values = [multiplier(config.schedule, step, config.steps) for step in steps]
    return "".join(BARS[round(value * (len(BARS) - 1))] for value in values)
