"""The sections of a run's configuration: their keys, types and defaults.

Each is a part of `muonscale.lab.config.load.Config`, which says what must hold between them. Those of what
is watched and kept of a run are in `muonscale.lab.config.sections`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from muonscale.errors import ConfigError, nearest
from muonscale.optim.options import (
    OPTIONS_OF,
    AdamWOptions,
    CommonOptions,
    MuonOptions,
    NarrowOptions,
    check_options_given,
    check_word,
    names_of,
    option_names,
)

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Steps = Annotated[float, Field(ge=0)]
Mark = Annotated[float, Field(gt=0)]
"""A place in a run: a fraction of its tokens below 1, training tokens from 1 (see lab/config/run_length.py)."""


class Section(BaseModel):
    """A frozen part of the configuration that knows all its keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


def _exactly_one(given: dict[str, object]) -> None:
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"give exactly one of {', '.join(given)}")


class RunSection(Section):
    """Where a run is kept and what it runs on: `run.*`."""

    path: Path
    """Folder of the run."""
    seed: int = 0
    """Seed of the initial weights, the data order and the held-out split."""
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    """CPU threads of torch, at most 1024; its own choice when not given."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes a GPU if there is one."""


class ModelSection(Section):
    """What is trained: `model.*`."""

    preset: str | None = None
    """Name of a built-in shape, such as `llama-nano`."""
    config: Path | None = None
    """A Hugging Face `config.json`, or a folder that holds one, instead of a preset."""
    weights: Path | None = None
    """A Hugging Face checkpoint folder to start from, which also gives the shape, instead of a preset
    or a config. Needs `data.tokenizer`, usually the same folder."""
    fields: dict[str, Any] = {}
    """Fields of the Hugging Face configuration to change, such as `hidden_size`; with `weights` only
    such as leave the weights as they are, such as `attention_dropout`."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        _exactly_one(
            {
                "model.preset": self.preset,
                "model.config": self.config,
                "model.weights": self.weights,
            }
        )
        return self

    @property
    def source(self) -> str:
        """The preset, the config or the weights, whichever is given."""
        return self.preset or str(self.config or self.weights)


class Ingredient(Section):
    """One corpus of a mixture: an item of `data.mixture`."""

    source: str | None = None
    """As `data.source`."""
    path: Path | None = None
    """As `data.path`, instead of a source."""
    weight: Annotated[float, Field(ge=0)]
    """Its part of the training tokens, relative to the others'; 0 where only a stage reads it."""
    name: str | None = None
    """What it is called; the source, or the last part of the path, when not given."""
    format: Literal["text", "chat"] | None = None
    """As `data.format`, which holds when this is not given."""
    field: str | None = None
    """As `data.field`, likewise."""
    split: str | None = None
    """As `data.split`, likewise."""
    max_bytes: Positive | None = None
    """As `data.max_bytes`, likewise."""

    @model_validator(mode="after")
    def _one_source(self) -> Ingredient:
        _exactly_one({"data.mixture.N.source": self.source, "data.mixture.N.path": self.path})
        return self

    @property
    def title(self) -> str:
        """Its name, given or not."""
        return self.name or self.source or (self.path or Path()).name


class DataSection(Section):
    """What it is trained on: `data.*`."""

    source: str | None = None
    """`python-stdlib` (this machine's Python library), `python-reference` (the text of its language
    reference) or `hf:NAME` (a Hugging Face dataset)."""
    path: Path | None = None
    """A text, JSONL or parquet file, or a folder of them, instead of a source."""
    mixture: Annotated[list[Ingredient], Field(min_length=1, max_length=32)] | None = None
    """Several of them with weights, instead of one."""
    format: Literal["text", "chat"] = "text"
    """`chat`: conversations, of which the assistant's turns are learned."""
    field: str | None = None
    """Column or key that holds the text in JSONL, parquet and Hugging Face data; when not given,
    `text`, and `messages` where the format is chat."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    max_bytes: Positive | None = None
    """Stop reading the corpus after this many bytes of text."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8."""
    tokenizer: str | None = None
    """A `tokenizer.json`, a folder or a Hugging Face name; not given, one is trained on the corpus."""
    chat_template: Annotated[Literal["plain"] | Path | None, Field(union_mode="left_to_right")] = (
        None
    )
    """Jinja file that writes a conversation out, or `plain`: a built-in one of ordinary text; the
    tokenizer's own when not given."""
    vocab_size: Annotated[int, Field(ge=257, le=2**31 - 1)] = 1024
    """Size of the tokenizer trained on the corpus: 256 bytes, the end of text, and merges."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens of one training sequence."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the corpus kept for evaluation and never trained on."""
    cache: Path | None = None
    """Where prepared tokens are kept; the user's cache folder when not given."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        _exactly_one(
            {"data.source": self.source, "data.path": self.path, "data.mixture": self.mixture}
        )
        return self

    @model_validator(mode="after")
    def _named_apart(self) -> DataSection:
        names = [item.title for item in self.mixture or ()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two items of data.mixture are called {twice[0]!r}; give them a name")
        if self.mixture is not None and not any(item.weight for item in self.mixture):
            raise ValueError(
                f"all {len(names)} items of data.mixture have weight 0; give one a weight above it"
            )
        return self

    @model_validator(mode="after")
    def _chats(self) -> DataSection:
        for part in self.corpora if self.has_chats else ():
            if part.format == "chat" and not (part.path or str(part.source).startswith("hf:")):
                raise ValueError(
                    f"data.format=chat: {part.source} holds no conversations; accepted: data.path, "
                    "and data.source=hf:NAME"
                )
        if self.has_chats and self.tokenizer is None:
            raise ValueError(
                "data.format=chat needs data.tokenizer, which is null: chats are no text to train a "
                "tokenizer on"
            )
        if self.chat_template is not None and not self.has_chats:
            raise ValueError(
                f"data.chat_template={self.chat_template} is given, and data.format is text; "
                "leave it out, or set data.format=chat"
            )
        return self

    @property
    def has_chats(self) -> bool:
        """Whether any of its corpora holds conversations."""
        return any(part.format == "chat" for part in self.corpora)

    @property
    def text_field(self) -> str:
        """The field that is read, given or not."""
        return self.field or {"text": "text", "chat": "messages"}[self.format]

    @property
    def weights(self) -> dict[str, float]:
        """The corpora by name and what of each is read, relative to the others."""
        if self.mixture is None:
            return {self.source or str(self.path): 1.0}
        return {item.title: item.weight for item in self.mixture}

    @property
    def corpora(self) -> list[DataSection]:
        """Sections that name one corpus each, in the order of `weights`."""
        if self.mixture is None:
            return [self]
        return [self._of(item) for item in self.mixture]

    def _of(self, item: Ingredient) -> DataSection:
        own = item.model_dump(include={"format", "field", "split", "max_bytes"}, exclude_none=True)
        place = {"source": item.source, "path": item.path, "mixture": None}
        return self.model_copy(update=own | place)


class OptimizerSection(Section, AdamWOptions, MuonOptions, CommonOptions):  # pyrefly: ignore
    """How it is updated: `optimizer.*`."""

    model_config = ConfigDict(extra="allow")  # options of rules that somebody has registered

    rule: str = "muon"
    """Rule of the hidden matrices: `muon`, with AdamW for the rest, or `adamw`."""
    lr: Annotated[float, Field(gt=0, le=1e30)] = 0.01
    """Peak learning rate of every group."""
    adamw_lr: Annotated[float, Field(gt=0, le=1e30)] | None = None
    """Peak learning rate of embeddings, head, norms and biases, under either rule; null for `lr`."""
    ns_coefficients: str = "jordan"
    """Newton-Schulz polynomials, a name from muonscale.optim.newton_schulz.coefficients."""
    ns_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Dtype of the Newton-Schulz products; `auto` is bfloat16 where that is fast, else float32."""
    scale: str | Annotated[float, Field(gt=0)] = "rms"
    """Shape factor: rms, rms_exact, spectral, keller, none, another project's name for one, or a
    number for all shapes."""
    nonfinite: Literal["raise", "skip"] = "raise"
    """A NaN or an infinity in a gradient: stop with an error, or leave the step out and count it."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the raw gradients of the clipped groups; null for no clipping."""
    clip: Literal["adamw", "all"] = "adamw"
    """Which gradients are clipped: those of the AdamW rule, or all together."""
    qk_clip: Annotated[float, Field(gt=0)] | None = None
    """Scale the weights of attention heads whose largest logit of a step is above this (QK-clip, 100
    in Kimi K2); null for no clipping. Every step is then heard, which takes time."""
    qk_clip_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The queries' part of it; keys take the rest."""
    overrides: dict[str, dict[str, Any]] = {}
    """Options for a role or a glob over parameter names, such as `{router: {rule: adamw}}`."""
    state: Path | None = None
    """A state dict, saved by torch.save, to start from: momentum and moments, none of the options."""
    state_format: Literal["torch", "keller", "keller_2024", "moonlight", "normuon"] | None = None
    """Which optimizer saved it, a name from muonscale.optim.migrate.convert_state; null for muonscale's."""

    @field_validator("rule", *names_of(AdamWOptions, MuonOptions, CommonOptions))
    @classmethod
    def _accepted(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        try:
            if name == "rule":
                check_word(name, value, tuple(OPTIONS_OF))
            check_options_given({name: value})
        except ConfigError as error:
            raise ValueError(f"optimizer.{error}") from None
        return value

    @model_validator(mode="after")
    def _options_of_registered_rules(self) -> OptimizerSection:
        for key, value in (self.__pydantic_extra__ or {}).items():
            if key not in option_names() or key in names_of(NarrowOptions):
                accepted = {*type(self).model_fields, *option_names()} - {*names_of(NarrowOptions)}
                raise ValueError(f"unknown key optimizer.{key}; {nearest(key, accepted)}")
            check_options_given({key: value})
        return self

    @model_validator(mode="after")
    def _format_of_a_state(self) -> OptimizerSection:
        if self.state_format is not None and self.state is None:
            raise ValueError(
                f"optimizer.state_format={self.state_format} is given without optimizer.state; "
                "give the file too, or leave it out"
            )
        return self


class TransferSection(Section):
    """Hyper-parameters found at another width: `transfer.*`."""

    base: str | dict[str, Any] | None = None
    """Where they were found: a preset, or the fields of this model that were different there, such as
    `{hidden_size: 128, num_attention_heads: 4}`. Null for none: nothing is multiplied."""
    convention: Literal["spectral", "adam_table", "standard"] = "spectral"
    """How learning rate, decay and eps change with the width; `standard` not at all."""
    depth: Literal["none", "complete_p"] = "none"
    """`complete_p` divides residual branches by the layers that the model has to one of the base's."""


class RoutingSection(Section):
    """How a mixture of experts is kept in balance: `routing.*`."""

    bias_rate: float | Literal["auto"] | None = "auto"
    """Step of the bias that routers add before they choose, after every optimizer step; null for
    none. `auto` is 0.001 for a model whose routers have such a bias, else none."""
    bias_update: Literal["centered", "sign"] = "centered"
    """Its direction: the sign of mean load minus load, less the mean sign over the experts (Moonlight,
    appendix C), or the sign alone (DeepSeek-V3)."""
    aux_loss: Annotated[float, Field(gt=0)] | None = None
    """Coefficient of the sequence-level auxiliary loss (DeepSeek-V3, eq. 17), summed over layers;
    null for none, whatever the model's configuration has."""

    @field_validator("bias_rate", mode="before")
    @classmethod
    def _rate(cls, value: Any) -> Any:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        if not number and value not in ("auto", None):
            raise ValueError(
                f"routing.bias_rate={value!r} is none of what is accepted: a number above 0, auto, null"
            )
        return value


ShapeT = Literal["cosine", "linear", "wsd", "constant-linear", "constant"]


class Stage(Section):
    """A part of a run: an item of `schedule.stages`."""

    until: Mark | None = None
    """Where it ends: a fraction of the run's tokens below 1, training tokens from 1; null for the
    last one, which ends with the run."""
    name: ShapeT
    """Shape of the multiplier on every learning rate."""
    warmup: Steps = 0
    """Linear way from where the stage before ended (0 for the first) to `peak`: a fraction of the
    stage below 1, a number of steps from 1."""
    decay: Steps = 0.2
    """Final decay of `wsd` and `constant-linear`: a fraction of the stage below 1, steps from 1."""
    peak: Annotated[float, Field(gt=0)] = 1.0
    """Largest multiplier."""
    final: Annotated[float, Field(ge=0)] = 0.1
    """Multiplier at the end of the stage; `constant` ends at its peak."""
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Weights of `data.mixture` by name in this stage, 0 for those left out; those of the mixture
    when not given."""
    bias_rate: Annotated[float, Field(ge=0)] | None = None
    """Rate of the router bias in this stage; `routing.bias_rate` when not given."""


class ScheduleSection(Section):
    """How the learning rate changes: `schedule.*`."""

    name: Literal[ShapeT, "stages"] = "cosine"
    """Shape of the multiplier on every learning rate; `stages` takes all from the list of them."""
    warmup: Steps = 0.02
    """Linear warm-up: a fraction of the run below 1, a number of steps from 1."""
    decay: Steps = 0.2
    """Final decay of `wsd` and `constant-linear`: a fraction of the run below 1, steps from 1."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Multiplier at the end of the run; `constant` has none."""
    stages: list[Stage] = []
    """Parts of the run, one after the other."""

    @model_validator(mode="after")
    def _stages_or_a_shape(self) -> ScheduleSection:
        if (self.name == "stages") != bool(self.stages):
            raise ValueError(
                f"schedule.name={self.name} with {len(self.stages)} items in schedule.stages: "
                "the list and the name `stages` belong together"
                ", so give both or none"
            )
        ends = [stage.until for stage in self.stages]
        if ends and (None in ends[:-1] or ends[-1] is not None):
            raise ValueError(
                f"schedule.stages end at {', '.join(map(str, ends))}: give `until` to all of them "
                "but the last, which ends with the run"
            )
        return self


class BatchChange(Section):
    """An item of `train.batch_schedule`."""

    after: Mark
    """From where on: a fraction of the run's tokens below 1, training tokens from 1."""
    batch_tokens: Positive
    """As `train.batch_tokens`."""


class TrainSection(Section):
    """How long, and how much at a time: `train.*`."""

    tokens: Positive | None = None
    """Length of the run in training tokens, rounded up to whole steps."""
    steps: Positive | None = None
    """Length of the run in steps, instead of tokens."""
    batch_tokens: Positive = 8192
    """Training tokens of one step, over all processes; a multiple of data.sequence_length."""
    batch_schedule: list[BatchChange] = []
    """Other batches later in the run, in order."""
    micro_batch_tokens: Positive | None = None
    """Tokens that one process takes through the model at a time, gradients being accumulated; a
    multiple of data.sequence_length. Its whole share of the batch when not given."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of forward and backward passes and of the gradients that are reduced over processes;
    parameters are float32. `auto` is bfloat16 on a GPU that has it, else float32."""
    activation_checkpointing: bool = False
    """Keep only the input of every layer and compute the rest again in the backward pass."""
    compile: bool = False
    """Run every layer through torch.compile; takes a minute at the start."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        _exactly_one({"train.tokens": self.tokens, "train.steps": self.steps})
        if self.batch_schedule and self.tokens is None:
            raise ValueError(
                f"train.steps={self.steps} with a train.batch_schedule, which counts tokens: give "
                "train.tokens instead"
            )
        return self


class ParallelSection(Section):
    """How the processes that torchrun started share the work: `parallel.*`."""

    data: Literal["fsdp", "hsdp", "ddp"] = "fsdp"
    """Who reads different data: `fsdp` shards parameters over all ranks (FSDP2), `hsdp` within each
    of several replicas, `ddp` keeps all of them on every rank."""
    replicas: Positive | None = None
    """Replicas of `hsdp`; one for each machine when not given."""
    tensor: Positive = 1
    """Ranks that share every layer's matrices and read the same data (tensor parallelism)."""
    sequence: bool = False
    """Divide the sequence among them between these matrices (sequence parallelism)."""
    expert: Positive = 1
    """Data-parallel ranks among which routed experts are dealt out (expert parallelism)."""


# What is watched and kept of a run; none of it changes what is learned.


class EvalSection(Section):
    """Held-out loss and the sample: `eval.*`."""

    every: Positive = 100
    """Steps between evaluations; the last step is always evaluated, on the whole held-out split."""
    tokens: Positive = 16384
    """Held-out tokens of an evaluation on the way."""
    batch_tokens: Positive = 8192
    """Tokens of one evaluation batch: bounds its memory."""
    prompt: str = ""
    """Start of the sample text written at the end."""
    sample_tokens: Annotated[int, Field(ge=0)] = 200
    """Length of the sample text; 0 for none."""


class CheckpointSection(Section):
    """What is kept to resume from and to export: `checkpoint.*`."""

    every: Positive = 100
    """Steps between checkpoints; one is always written at the end and on Ctrl-C or SIGTERM."""
    keep: Positive = 2
    """How many of the newest checkpoints stay on disk, those of `marks` not counted."""
    marks: list[Mark] = []
    """Checkpoints kept for good: after a fraction of the run's tokens below 1, after training tokens
    from 1. Each is written at the first step at or after it."""


class TelemetrySection(Section):
    """What is recorded of weights and updates besides their loss: `telemetry.*`."""

    every: Positive | None = None
    """Steps between records in metrics.jsonl; null for none. Each costs a copy of the parameters."""
    matrices: Annotated[int, Field(ge=0)] = 8
    """Matrices of each group whose singular values are taken, spread evenly over the group."""
    attention_every: Positive | None = None
    """Steps between records of the attention logits; null for none. Such a step computes them once
    more."""
    noise_scale_every: Positive | None = None
    """Steps between records of the gradient noise scale; null for none. Such a step has the memory of
    one more gradient, and ranks exchange gradients after every micro-batch."""

    def noise_scale_due(self, step: int) -> bool:
        """Return whether the noise scale is measured in a step, the first being step 0."""
        return self.noise_scale_every is not None and (step + 1) % self.noise_scale_every == 0


TRACKER_NAMES = ("tensorboard", "wandb", "trackio")


class TrackSection(Section):
    """Where a run is followed besides its folder: `track.*`; `track=wandb` sets `track.to`."""

    to: list[str] = []
    """Any of `tensorboard`, `wandb` and `trackio`; one needs no brackets, and `none` is none."""
    project: Annotated[str, Field(min_length=1)] = "muonscale"
    """Project of Weights & Biases and Trackio."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """Name of the run there; that of its folder when not given."""
    mode: Literal["online", "offline"] | None = None
    """`offline`: nothing leaves this machine. When not given, Weights & Biases asks `WANDB_MODE`, else
    is online, and Trackio logs elsewhere only if one of its variables says so."""

    @field_validator("to", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        names = [] if value in (None, "none") else value
        names = [part.strip() for part in names.split(",")] if isinstance(names, str) else names
        if not isinstance(names, list):
            raise ValueError(
                f"track={value!r} is no list of trackers; {nearest('', TRACKER_NAMES)}"
            )
        for name in names:
            if name not in TRACKER_NAMES:
                hint = nearest(name, [*TRACKER_NAMES, "none"])
                raise ValueError(f"track={name}: there is no such tracker; {hint}")
        return list(dict.fromkeys(names))


class ProfileSection(Section):
    """What is measured of the run itself: `profile.*`."""

    steps: str | None = None
    """Steps to profile, as `first:end` without the end: `10:15` is steps 10 to 14, counted as in
    metrics.jsonl. Null for none."""

    @field_validator("steps", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        form = r"[1-9]\d*:[1-9]\d*"
        if value is not None and not (isinstance(value, str) and re.fullmatch(form, value)):
            raise ValueError(
                f"profile.steps={value!r} is no range of steps; accepted: first:end, such as 10:15 for "
                "steps 10 to 14"
            )
        return value

    @property
    def step_range(self) -> range:
        """The steps, the first being step 1; empty for none."""
        if self.steps is None:
            return range(0)
        first, end = map(int, self.steps.split(":"))
        return range(first, end)
