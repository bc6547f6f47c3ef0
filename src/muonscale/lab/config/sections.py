"""The sections of a run's configuration: keys, types, defaults, help, and checks within a section.

`muonscale.lab.config.load.Config` holds all sections and checks what must hold between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from muonscale.errors import ConfigError, nearest, shown
from muonscale.lab.files import NO_URL, is_url
from muonscale.optim.options import (
    OPTIONS_OF,
    AdamWOptions,
    CommonOptions,
    GroupingOptions,
    MuonOptions,
    NarrowOptions,
    check_options_given,
    check_schedulable,
    check_word,
    names_of,
    option_names,
)
from muonscale.transfer.options import ConventionT, DepthT

FACTORS = {
    "k": 10**3,
    "m": 10**6,
    "b": 10**9,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
}
"""Factors of the suffixes of a number, in any case: 1M is a million, 1Mi is 2**20."""
SHORT_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


def read_number(value: Any) -> Any:
    """Return the number that text such as 10B, 0.5M, 512k or 512Ki stands for; others unchanged."""
    form = rf"(\d+\.?\d*|\.\d+) ?({'|'.join(FACTORS)})"
    match = re.fullmatch(form, value, re.IGNORECASE) if isinstance(value, str) else None
    if match is None:
        return value
    number = Decimal(match[1]) * FACTORS[match[2].lower()]
    return int(number) if number == int(number) else float(number)


def read_dtype(value: Any) -> Any:
    """Return the whole name of a dtype that is given as bf16, fp32 or fp64; others unchanged."""
    return SHORT_DTYPES.get(value, value) if isinstance(value, str) else value


Positive = Annotated[int, BeforeValidator(read_number), Field(gt=0, le=10**18)]
"""A count; products of tokens and steps stay within 64 bits."""
Seed = Annotated[int, Field(ge=0, le=2**62)]
"""A seed, as numpy and torch take it; seeds of samples count up from it."""
BatchTokens = Annotated[int, BeforeValidator(read_number), Field(gt=0, le=2**32)]
"""Tokens of a batch: the numbers of its sequences are held in memory."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
Steps = Annotated[float, BeforeValidator(read_number), Field(ge=0)]
Mark = Annotated[float, BeforeValidator(read_number), Field(gt=0)]
"""A point of a run: a fraction of its tokens if below 1, else training tokens (`run_length`)."""


class Section(BaseModel):
    """A frozen part of the configuration that refuses unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_a_flag_as_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic reads `true` as 1.0 where a number is wanted."""
        name = info.field_name or ""
        if isinstance(value, bool) and not _takes_flags(cls.model_fields[name].annotation):
            raise PydanticCustomError("flag", "Input should not be true or false")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_a_url_as_a_path(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if is_url(value) and _is_made_of(annotation, Path):
            raise PydanticCustomError("url", NO_URL)
        return value


def _takes_flags(annotation: Any) -> bool:
    return _is_made_of(annotation, bool, Any, True, False)


def _is_made_of(annotation: Any, *kinds: Any) -> bool:
    """Return whether a type, or one of those it is made of, is one of `kinds`."""
    return any(annotation is kind for kind in kinds) or any(
        _is_made_of(part, *kinds) for part in get_args(annotation)
    )


def _exactly_one(given: dict[str, object]) -> None:
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"give exactly one of {', '.join(given)}")


class RunSection(Section):
    """The folder, seed and device of a run: `run.*`."""

    path: Path
    """The run folder."""
    seed: Seed = 0
    """Seed of the initial weights, the data order and the validation split."""
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    """CPU threads of torch, at most 1024. The default is torch's own."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on; `auto` is a GPU of CUDA or ROCm if there is one, else the CPU. `mps` is
    an Apple GPU, which was not tried on a Mac.
    """


class ModelSection(Section):
    """The model: `model.*`."""

    preset: str | None = None
    """Name of a built-in shape, such as `llama-nano`."""
    config: Path | None = None
    """A Hugging Face `config.json` or its folder, instead of a preset."""
    weights: Path | None = None
    """A Hugging Face checkpoint folder to start from, instead of a preset or a config. It needs
    `data.tokenizer`, which is usually the same folder."""
    fields: dict[str, Any] = {}
    """Fields of the Hugging Face configuration to change, such as `hidden_size`. With `weights`,
    only fields that do not change the weights, such as `attention_dropout`."""

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


class AdapterSection(Section):
    """A LoRA adapter of `model.weights`, which are then frozen: `adapter.*`."""

    rank: Positive | None = None
    """Rank of the trained matrices; null to train the weights themselves."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Their product is multiplied by alpha / rank. The default is twice the rank."""
    dropout: Fraction = 0.0
    """Dropout of their inputs."""
    targets: list[str] = []
    """Names of the layers, or the ends of their names, such as `q_proj`; empty for all linear
    layers but the head."""

    @model_validator(mode="after")
    def _check_rank(self) -> AdapterSection:
        fields = type(self).model_fields
        given = [name for name in fields if getattr(self, name) != fields[name].default]
        if given and self.rank is None:
            raise ValueError(
                f"adapter.{given[0]}={getattr(self, given[0])} is given, and adapter.rank is null"
            )
        return self


def check_paths(value: Any) -> Any:
    """Return the value of a key that accepts a path or a list of paths, as texts."""
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(item, str | Path) for item in value):
        return [str(item) for item in value]
    if value is None:
        return None
    raise ValueError(f"path={shown(value)} is neither a path nor a list of paths")


def list_paths(paths: str | list[str] | None) -> list[str]:
    """Return the value of a key that accepts one path or a list of them as a list."""
    return [paths] if isinstance(paths, str) else paths or []


def join_paths(paths: str | list[str] | None, show: Callable[[str], str] = str) -> str:
    """Return such a value as text."""
    return ", ".join(map(show, list_paths(paths)))


class Ingredient(Section):
    """One corpus of a mixture: an item of `data.mixture`."""

    source: str | None = None
    """As `data.source`."""
    path: str | list[str] | None = None
    """As `data.path`, instead of a source."""
    weight: Annotated[float, Field(ge=0)]
    """Its share of the training tokens, relative to the other items; 0 if only a stage reads it."""
    name: str | None = None
    """Its name. The default is the source, or the last part of the path."""
    format: Literal["text", "chat", "tokens"] | None = None
    """As `data.format`, which is the default."""
    field: str | None = None
    """As `data.field`, which is the default."""
    split: str | None = None
    """As `data.split`, which is the default."""
    max_bytes: Positive | None = None
    """As `data.max_bytes`, which is the default."""

    @field_validator("path", mode="before")
    @classmethod
    def _check_path(cls, value: Any) -> Any:
        return check_paths(value)

    @model_validator(mode="after")
    def _one_source(self) -> Ingredient:
        _exactly_one({"data.mixture.N.source": self.source, "data.mixture.N.path": self.path})
        return self

    @property
    def title(self) -> str:
        """Its name, or the default."""
        return self.name or self.source or join_paths(self.path, lambda path: Path(path).name)


class DataSection(Section):
    """The training data: `data.*`."""

    source: str | None = None
    """`python-stdlib` (source of this machine's Python library), `python-reference` (text of its
    language reference) or `hf:NAME` (a Hugging Face dataset)."""
    path: str | list[str] | None = None
    """A file, a folder, a pattern such as `books/**/*.md`, a URL such as `s3://bucket/text`, or a
    list of these, instead of a source."""
    include: list[str] = []
    """Patterns, as in .gitignore, of the files to read in a folder or an archive; empty for all."""
    exclude: list[str] = []
    """Patterns, as in .gitignore, of files and folders not to read."""
    gitignore: bool = True
    """Leave out what the .gitignore files in a folder ignore."""
    mixture: Annotated[list[Ingredient], Field(min_length=1, max_length=32)] | None = None
    """Several corpora with weights, instead of one."""
    format: Literal["text", "chat", "tokens"] = "text"
    """`text`: plain text. `chat`: conversations, in which only the assistant's turns are
    targets. `tokens`: ids that another program wrote with `data.tokenizer`."""
    token_dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    """Type of the ids in `.bin` files without a header, for `data.format=tokens`."""
    field: str | None = None
    """Key or column that holds the text in JSON, tables and Hugging Face data. The default is
    `text`; for chats `messages` or `conversations`, or `instruction` and `output`."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    max_bytes: Positive | None = None
    """Stop reading the corpus after this many bytes of text."""
    errors: Literal["strict", "replace"] = "strict"
    """`strict`: refuse bytes that are not UTF-8. `replace`: substitute U+FFFD for them."""
    tokenizer: str | None = None
    """A `tokenizer.json`, another file of a tokenizer, a folder or a Hugging Face name. By default
    one is trained on the corpus."""
    chat_template: Annotated[Literal["plain"] | Path | None, Field(union_mode="left_to_right")] = (
        None
    )
    """Jinja file of a chat template, or `plain` for a built-in one without special tokens. The
    default is the tokenizer's own."""
    vocab_size: Annotated[int, Field(ge=257, le=2**31 - 1)] = 1024
    """Size of a tokenizer that is trained on the corpus: 256 bytes, the end of text, and merges."""
    sequence_length: Annotated[int, Field(ge=2, le=2**32)] = 256
    """Tokens of a training sequence."""
    document_mask: bool = False
    """Keep the documents of a sequence of text apart: attention stops where a document begins, and
    positions start again at 0. For models that are known to do this."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the corpus in the validation split, which is never trained on."""
    stream: bool = False
    """Begin to train on a corpus of text when its validation split and its first shard are
    tokenized, while another process goes on with the rest; the order of the rows differs."""
    cache: Path | None = None
    """Folder of prepared tokens. The default is the user's cache folder."""

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _check_tokenizer(cls, value: Any) -> Any:
        if is_url(value):
            raise PydanticCustomError("url", NO_URL)
        return value

    @field_validator("path", mode="before")
    @classmethod
    def _check_path(cls, value: Any) -> Any:
        return check_paths(value)

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        _exactly_one(
            {"data.source": self.source, "data.path": self.path, "data.mixture": self.mixture}
        )
        return self

    @model_validator(mode="after")
    def _check_mixture(self) -> DataSection:
        names = [item.title for item in self.mixture or ()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two items of data.mixture have the name {twice[0]!r}; set `name`")
        if self.mixture is not None and not any(item.weight for item in self.mixture):
            raise ValueError(f"all {len(names)} items of data.mixture have weight 0")
        return self

    @model_validator(mode="after")
    def _check_tokens(self) -> DataSection:
        for part in self.corpora:
            if part.format != "tokens":
                continue
            if part.path is None:
                raise ValueError(f"data.format=tokens: {part.source} has text; give data.path")
            if self.tokenizer is None:
                raise ValueError(
                    f"data.format=tokens needs the tokenizer of the ids in {part.title}: data.tokenizer"
                )
            if part.max_bytes is not None:
                raise ValueError(
                    f"data.max_bytes={part.max_bytes} is of text, and {part.path} of tokens"
                )
        return self

    @model_validator(mode="after")
    def _check_stream(self) -> DataSection:
        if self.stream and (self.mixture is not None or self.format != "text"):
            what = f"format={self.format}" if self.mixture is None else "mixture"
            raise ValueError(
                f"data.stream=true is for one corpus of text, and data.{what} is prepared whole; "
                "leave data.stream out"
            )
        return self

    @model_validator(mode="after")
    def _check_chats(self) -> DataSection:
        for part in self.corpora if self.has_chats else ():
            if part.format == "chat" and not (part.path or str(part.source).startswith("hf:")):
                raise ValueError(
                    f"data.format=chat: {part.source} holds no conversations; give data.path or "
                    "data.source=hf:NAME"
                )
        if self.has_chats and self.tokenizer is None:
            raise ValueError(
                "data.format=chat needs data.tokenizer, which is null: no tokenizer is trained on "
                "chats"
            )
        if self.document_mask and self.has_chats:
            raise ValueError(
                f"data.document_mask={self.document_mask} is for text, and data.format=chat is "
                "given: conversations are always kept apart"
            )
        if self.chat_template is not None and not self.has_chats:
            raise ValueError(
                f"data.chat_template={self.chat_template} needs data.format=chat, and it is text"
            )
        return self

    @property
    def paths(self) -> list[str]:
        """What `path` names, as a list."""
        return list_paths(self.path)

    @property
    def title(self) -> str:
        """The source, or the paths, for people."""
        return self.source or join_paths(self.path)

    @property
    def has_chats(self) -> bool:
        """Whether any of its corpora holds conversations."""
        return any(part.format == "chat" for part in self.corpora)

    @property
    def text_field(self) -> str:
        """The key or column that holds the text."""
        return self.field or ("messages" if self.format == "chat" else "text")

    @property
    def weights(self) -> dict[str, float]:
        """Relative shares of the corpora, by name."""
        if self.mixture is None:
            return {self.title: 1.0}
        return {item.title: item.weight for item in self.mixture}

    @property
    def shares(self) -> dict[str, float]:
        """The weights, divided by their sum."""
        total = sum(self.weights.values())
        return {name: weight / total for name, weight in self.weights.items()}

    @property
    def corpora(self) -> list[DataSection]:
        """A section for each corpus, in the order of `weights`."""
        if self.mixture is None:
            return [self]
        own = {"format", "field", "split", "max_bytes"}
        return [
            self.model_copy(
                update=item.model_dump(include=own, exclude_none=True)
                | {"source": item.source, "path": item.path, "mixture": None}
            )
            for item in self.mixture
        ]


class OptimizerSection(  # pyrefly: ignore
    Section, GroupingOptions, AdamWOptions, MuonOptions, CommonOptions
):
    """The optimizer: `optimizer.*`."""

    model_config = ConfigDict(extra="allow")  # options of registered rules

    rule: str = "muon"
    """Rule of the hidden matrices: `muon`, with AdamW for all other parameters, or `adamw`."""
    lr: Annotated[float, Field(gt=0, le=1e30)] = 0.01
    """Peak learning rate of every group."""
    adamw_lr: Annotated[float, Field(gt=0, le=1e30)] | None = None
    """Peak learning rate of embeddings, head, norms and biases, under either rule; null for
    `lr`."""
    ns_coefficients: str = "jordan"
    """Newton-Schulz polynomials: a name from `muonscale.optim.newton_schulz.coefficients`."""
    ns_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Dtype of the Newton-Schulz products; `auto` is bfloat16 if the device is fast at it."""
    scale: str | Annotated[float, Field(gt=0)] = "rms"
    """Shape factor: rms, rms_exact, spectral, keller, none, the name of another project's factor,
    or one number for all shapes."""
    nonfinite: Literal["raise", "skip"] = "raise"
    """A gradient that is not finite: `raise` stops with an error, `skip` skips and counts the
    step."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Norm to which the raw gradients of the clipped groups are clipped; null for no clipping."""
    clip: Literal["adamw", "all"] = "adamw"
    """Gradients that are clipped: those of the AdamW rule, or all together."""
    qk_clip: Annotated[float, Field(gt=0)] | None = None
    """QK-clip: scale down the query and key weights of heads whose largest attention logit in a
    step exceeds this number (100 in Kimi K2); null for no clipping. The logits are then computed in
    every step, which takes time."""
    qk_clip_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the queries in QK-clip; the keys take the rest."""
    overrides: dict[str, dict[str, Any]] = {}
    """Options for a role or a glob over parameter names, such as `{router: {rule: adamw}}`."""
    state: Path | None = None
    """A state dict, saved by torch.save, to take momentum and moments from. Its options are
    ignored."""
    state_format: Literal["torch", "keller", "keller_2024", "moonlight", "normuon"] | None = None
    """Optimizer that saved `state`: a name from `muonscale.optim.migrate.convert_state`; null for
    muonscale's own."""

    _dtypes = field_validator("ns_dtype", "comm_dtype", mode="before")(read_dtype)

    @field_validator("rule", *names_of(AdamWOptions, MuonOptions, CommonOptions))
    @classmethod
    def _accepted(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        try:
            if name == "rule":
                cls._refuse_value_of_another_key(value)
                check_word(name, value, tuple(OPTIONS_OF))
            check_options_given({name: value})
        except ConfigError as error:
            raise ValueError(f"optimizer.{error}") from None
        return value

    @model_validator(mode="after")
    def _check_registered_options(self) -> OptimizerSection:
        for key, value in (self.__pydantic_extra__ or {}).items():
            if key not in option_names() or key in names_of(NarrowOptions):
                accepted = {*type(self).model_fields, *option_names()} - {*names_of(NarrowOptions)}
                raise ValueError(f"unknown key optimizer.{key}; {nearest(key, accepted)}")
            check_options_given({key: value})
        return self

    @classmethod
    def _refuse_value_of_another_key(cls, rule: str) -> None:
        """Point from such as rule=normuon to the key that has this value."""
        for key, field in cls.model_fields.items():
            kinds = (field.annotation, *get_args(field.annotation))
            if rule not in OPTIONS_OF and any(rule in get_args(kind) for kind in kinds):
                raise ConfigError(f"rule={rule} is not a rule; give optimizer.{key}={rule}")

    @model_validator(mode="after")
    def _check_state(self) -> OptimizerSection:
        if self.state_format is not None and self.state is None:
            raise ValueError(
                f"optimizer.state_format={self.state_format} is given without optimizer.state"
            )
        return self


class TransferSection(Section):
    """Transfer of hyper-parameters from another width: `transfer.*`."""

    base: str | dict[str, Any] | None = None
    """The model that the hyper-parameters were tuned on: a preset, or the fields that differ from
    this model, such as `{hidden_size: 128, num_attention_heads: 4}`. Null for no transfer."""
    convention: ConventionT = "spectral"
    """How learning rate, decay and eps change with the width; `standard` changes nothing."""
    depth: DepthT = "none"
    """`complete_p` divides residual branches by the ratio of the numbers of layers."""


class RoutingSection(Section):
    """Balance of the experts of a mixture of experts: `routing.*`."""

    bias_rate: float | Literal["auto"] | None = "auto"
    """Rate of the router bias, which is updated after every optimizer step; null for no updates.
    `auto` is 0.001 for a model whose routers have such a bias, else null."""
    bias_update: Literal["centered", "sign"] = "centered"
    """Direction of the update: the sign of mean load minus load (`sign`, DeepSeek-V3), or that sign
    minus its mean over the experts (`centered`, Moonlight, appendix C)."""
    aux_loss: Annotated[float, Field(gt=0)] | None = None
    """Coefficient of the sequence-level auxiliary loss (DeepSeek-V3, eq. 17), summed over layers;
    null for none. The model's own configuration is ignored."""

    @field_validator("bias_rate", mode="before")
    @classmethod
    def _rate(cls, value: Any) -> Any:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        if not number and value not in ("auto", None):
            raise ValueError(f"routing.bias_rate={value!r}; accepted: a number above 0, auto, null")
        return value


ShapeT = Literal["cosine", "linear", "wsd", "constant-linear", "constant"]


class Stage(Section):
    """A part of a run: an item of `schedule.stages`."""

    until: Mark | None = None
    """End of the stage: a fraction of the run's tokens if below 1, else training tokens; null for
    the last stage, which ends with the run."""
    name: ShapeT
    """Shape of the multiplier on every learning rate."""
    warmup: Steps = 0
    """Length of the linear warm-up from the end of the stage before (from 0 in the first stage) to
    `peak`: a fraction of the stage if below 1, else steps."""
    decay: Steps = 0.2
    """Length of the decay of `wsd` and `constant-linear`: a fraction of the stage if below 1, else
    steps."""
    peak: Annotated[float, Field(gt=0)] = 1.0
    """Largest multiplier."""
    final: Annotated[float, Field(ge=0)] = 0.1
    """Multiplier at the end of the stage; `constant` ignores it."""
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Weights of the corpora of `data.mixture` in this stage, by name; 0 for corpora that are left
    out. The default is the weights of the mixture."""
    bias_rate: Annotated[float, Field(ge=0)] | None = None
    """Rate of the router bias in this stage. The default is `routing.bias_rate`."""


class OptionPoint(Section):
    """A point of an option's schedule: an item of `schedule.options.NAME`."""

    at: Steps | Literal["end"]
    """Where: a fraction of the run if below 1, else a step; `end` is the last step."""
    value: float | None = None
    """The value there."""
    times: Annotated[float, Field(ge=0)] | None = None
    """Or a multiple of the value that each group has."""

    @model_validator(mode="after")
    def _one(self) -> OptionPoint:
        _exactly_one({"value": self.value, "times": self.times})
        return self


class ScheduleSection(Section):
    """The schedule of learning rates, and of other options: `schedule.*`."""

    name: Literal[ShapeT, "stages"] = "cosine"
    """Shape of the multiplier on every learning rate; `stages` uses the list `schedule.stages`."""
    warmup: Steps = 0.02
    """Length of the linear warm-up: a fraction of the run if below 1, else steps."""
    decay: Steps = 0.2
    """Length of the decay of `wsd` and `constant-linear`: a fraction of the run if below 1, else
    steps."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Multiplier at the end of the run; `constant` ignores it."""
    stages: list[Stage] = []
    """Stages of the run, in order."""
    options: dict[str, Annotated[list[OptionPoint], Field(min_length=1)]] = {}
    """Schedules of other options, by option (`momentum`, `weight_decay`, `rms`) or by group and
    option (`embedding.weight_decay`): points in order, with straight lines between them. Before
    the first and after the last point the value is that of the point."""

    @field_validator("options")
    @classmethod
    def _check_options(cls, value: dict[str, list[OptionPoint]]) -> dict[str, list[OptionPoint]]:
        for key, points in value.items():
            try:
                check_schedulable(key.rpartition(".")[2])
            except ConfigError as error:
                raise ValueError(f"schedule.options: {error}") from None
            if len({point.times is None for point in points}) > 1:
                raise ValueError(
                    f"schedule.options.{key}: some points have a value and some have times; give "
                    "one of both"
                )
        return value

    @property
    def all_stages(self) -> list[Stage]:
        """The stages of the run; a schedule without `stages` is one stage."""
        return self.stages or [Stage.model_validate(self.model_dump(exclude={"stages", "options"}))]

    @model_validator(mode="after")
    def _check_name(self) -> ScheduleSection:
        if (self.name == "stages") != bool(self.stages):
            raise ValueError(
                f"schedule.name={self.name} with {len(self.stages)} items in schedule.stages: the "
                "name `stages` needs the list, and no other name has one"
            )
        ends = [stage.until for stage in self.stages]
        if ends and (None in ends[:-1] or ends[-1] is not None):
            raise ValueError(
                f"schedule.stages end at {', '.join(map(str, ends))}: all of them need `until` but "
                "the last, which ends with the run"
            )
        return self


class BatchChange(Section):
    """An item of `train.batch_schedule`."""

    after: Mark
    """Start of this batch size: a fraction of the run's tokens if below 1, else training tokens."""
    batch_tokens: BatchTokens
    """As `train.batch_tokens`."""


class TrainSection(Section):
    """Length, batch and precision of training: `train.*`."""

    tokens: Positive | None = None
    """Length of the run in training tokens, rounded up to whole steps."""
    steps: Positive | None = None
    """Length of the run in steps, instead of tokens."""
    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Length of the run in passes through the training split of one corpus, instead of tokens,
    which are counted when the run starts."""
    target_loss: Annotated[float, Field(gt=0)] | None = None
    """End the run before that, at the first evaluation whose validation loss is at most this, and
    is so on the whole validation split too; null to train to the end."""
    batch_tokens: BatchTokens = 8192
    """Training tokens of a step, over all processes; a multiple of `data.sequence_length`."""
    batch_schedule: list[BatchChange] = []
    """Changes of the batch size during the run, in order."""
    micro_batch_tokens: BatchTokens | None = None
    """Tokens of a micro-batch on one process, over which gradients are accumulated; a multiple of
    `data.sequence_length`. The default is the whole share of the process."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of forward and backward passes and of the reduced gradients; parameters are float32.
    `auto` is bfloat16 on a GPU that supports it, else float32."""
    activation_checkpointing: bool = False
    """Keep only the input of every layer, and compute the rest again in the backward pass."""
    compile: bool = False
    """Compile every layer with torch.compile, which takes a minute at the start."""
    average: Literal["ema", "mean"] | None = None
    """Average of the weights beside the weights: `ema`, an exponential moving average, or `mean`,
    in which all weights count the same; null for none. It is evaluated whenever the weights are,
    and written to `model-average` at the end."""
    average_from: Mark = 0.8
    """Point of the run where the average begins: a fraction of its tokens if below 1, else training
    tokens."""
    average_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Weight of the average before an update of `ema`."""
    average_every: Positive = 1
    """Steps between updates of the average; with those between checkpoints, `mean` is their
    mean."""

    _dtypes = field_validator("precision", mode="before")(read_dtype)

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        lengths: dict[str, object] = {
            "train.tokens": self.tokens,
            "train.steps": self.steps,
            "train.epochs": self.epochs,
        }
        _exactly_one(lengths)
        if self.batch_schedule and self.steps is not None:
            raise ValueError(
                f"train.steps={self.steps} with train.batch_schedule: a run with changing batches "
                "needs train.tokens"
            )
        return self


class ParallelSection(Section):
    """How the processes of torchrun share the work: `parallel.*`."""

    data: Literal["fsdp", "hsdp", "ddp"] = "fsdp"
    """Data parallelism: `fsdp` shards parameters over all ranks (FSDP2), `hsdp` within each of
    several replicas, and `ddp` keeps all parameters on every rank."""
    replicas: Positive | None = None
    """Number of replicas of `hsdp`. The default is one per machine."""
    tensor: Positive = 1
    """Tensor parallelism: ranks that share the matrices of every layer and read the same data."""
    sequence: bool = False
    """Sequence parallelism: shard the sequence over the tensor-parallel ranks between the
    matrices."""
    expert: Positive = 1
    """Expert parallelism: data-parallel ranks that share the routed experts."""


# The sections below change what is measured and saved, and not the trained weights.


class EvalSection(Section):
    """Validation loss and the sample: `eval.*`."""

    every: Positive = 100
    """Steps between evaluations. The last step is always evaluated, on the whole validation
    split."""
    tokens: Positive = 16384
    """Validation tokens of an evaluation before the last step."""
    batch_tokens: BatchTokens = 8192
    """Tokens of an evaluation batch. Smaller batches need less memory."""
    prompt: str = ""
    """Prompt of the sample that is generated at the end."""
    sample_tokens: Annotated[int, Field(ge=0, le=2**32)] = 200
    """Tokens of the sample; 0 for none."""
    samples_every: Positive | None = None
    """Steps between samples during training, which are printed and written to `samples/`; null for
    none before the end. Each gathers the model on the first rank, which the others wait for."""
    tasks: list[str] = []
    """Tasks of lm-evaluation-harness that are measured during training, and at the end."""
    tasks_every: Positive | None = None
    """Steps between measurements of the tasks; null for one at the end. Each gathers the model on
    the first rank, which the others wait for."""
    tasks_limit: Positive | None = 100
    """Maximum number of documents of a task; null for all."""
    tasks_path: Path | None = None
    """Folder of your own task files."""


class CheckpointSection(Section):
    """Checkpoints, for resuming and exporting: `checkpoint.*`."""

    every: Positive = 100
    """Steps between checkpoints. One is always written at the end and on Ctrl-C, SIGTERM or SIGHUP."""
    keep: Positive = 2
    """Number of newest checkpoints to keep, besides those of `marks`."""
    marks: list[Mark] = []
    """Points of the run whose checkpoints are kept: a fraction of the run's tokens if below 1, else
    training tokens. The checkpoint is that of the first step at or after the point."""
    before_decay: bool = True
    """Keep the checkpoint at the beginning of the decay of `wsd` and `constant-linear`, from which
    `--extend` goes on with a longer run."""
    background: bool = False
    """Write checkpoints in a thread while training goes on, from a copy in the memory of the CPU.
    The next one waits until it is complete; the last one of a run is written without a thread."""


class TelemetrySection(Section):
    """Records about weights, updates and gradients: `telemetry.*`."""

    every: Positive | None = None
    """Steps between telemetry records; null for none. Each record copies the parameters."""
    matrices: Annotated[int, Field(ge=0)] = 8
    """Matrices of each group whose singular values are computed, spread evenly over the group."""
    attention_every: Positive | None = None
    """Steps between records of the attention logits; null for none. Such a step computes the logits
    twice."""
    noise_scale_every: Positive | None = None
    """Steps between records of the gradient noise scale; null for none. Such a step needs memory
    for one more gradient, and reduces gradients after every micro-batch."""

    def noise_scale_due(self, step: int) -> bool:
        """Return whether the noise scale is measured in a step; the first step is 0."""
        return self.noise_scale_every is not None and (step + 1) % self.noise_scale_every == 0


class LogSection(Section):
    """Lines of progress of a run without a terminal, as in a file: `log.*`."""

    every: Positive | None = None
    """Steps between lines; a line is printed after 30 seconds in any case. The default is a
    twentieth of the run."""


TRACKER_NAMES = ("tensorboard", "wandb", "trackio")


class TrackSection(Section):
    """Experiment trackers: `track.*`; `track=wandb` sets `track.to`."""

    to: list[str] = []
    """Any of `tensorboard`, `wandb` and `trackio`. One name needs no brackets; `none` is an empty
    list."""
    project: Annotated[str, Field(min_length=1)] = "muonscale"
    """Project in Weights & Biases and Trackio."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """Name of the run in the trackers. The default is the name of its folder."""
    mode: Literal["online", "offline"] | None = None
    """`offline` sends nothing to other machines. By default Weights & Biases follows `WANDB_MODE`,
    else is online, and Trackio is offline unless one of its environment variables names a
    server."""

    @field_validator("to", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        names = [] if value in (None, "none") else value
        names = [part.strip() for part in names.split(",")] if isinstance(names, str) else names
        if not isinstance(names, list):
            raise ValueError(
                f"track={value!r} is not a list of trackers; {nearest('', TRACKER_NAMES)}"
            )
        for name in names:
            if name not in TRACKER_NAMES:
                hint = nearest(name, {*TRACKER_NAMES, "none"} - {name})
                raise ValueError(f"track={name} is not a tracker; {hint}")
        return list(dict.fromkeys(names))


class ProfileSection(Section):
    """Profiling of single steps: `profile.*`."""

    steps: str | None = None
    """Steps to profile, as `first:end` without the end: `10:15` is steps 10 to 14, numbered as in
    metrics.jsonl; null for none."""

    @field_validator("steps", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        form = r"[1-9]\d*:[1-9]\d*"
        if value is not None and not (isinstance(value, str) and re.fullmatch(form, value)):
            raise ValueError(
                f"profile.steps={value!r} is not a range of steps; give first:end, such as 10:15 "
                "for steps 10 to 14"
            )
        return value

    @property
    def step_range(self) -> range:
        """The steps, numbered from 1; empty for none."""
        if self.steps is None:
            return range(0)
        first, end = map(int, self.steps.split(":"))
        return range(first, end)
