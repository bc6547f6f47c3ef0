"""Output layers are heads, wherever they stand and however many outputs they have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonscale.optim.parameters.roles import Role, assign_roles


def heads_of(model: nn.Module) -> list[str]:
    return [a.name for a in assign_roles(model) if a.role == Role.HEAD]


class Block(nn.Module):
    def __init__(self, width: int = 8, normed: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width) if normed else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        x = x + self.down(F.gelu(self.up(x)))
        return x if self.norm is None else self.norm(x)


class Decoder(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(8)
        self.project = nn.Linear(8, outputs)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> tuple:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.project(self.norm(x))
        if labels is None:
            return (logits,)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))
        output = (logits,) + (x,)  # noqa: RUF005  (as older models write it)
        return (loss, *output)


@pytest.mark.parametrize("outputs", [50, 64, 128, 3, 1])
def test_a_head_may_be_padded_or_map_to_something_else(outputs: int) -> None:
    assert heads_of(Decoder(outputs)) == ["project.weight"]


def test_wrappers_of_a_model_have_the_heads_of_the_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss = Decoder(3), nn.CrossEntropyLoss()

        def training_step(self, batch: Tensor) -> Tensor:
            return self.loss(self.net(batch), batch)

    assert heads_of(Wrapper()) == ["net.project.weight"]
    assert heads_of(torch.compile(Decoder(3))) == ["project.weight"]  # type: ignore[arg-type]


def test_several_heads_a_value_and_a_list_of_heads() -> None:
    class ManyHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Block()
            self.heads = nn.ModuleList(nn.Linear(8, n) for n in (3, 5))
            self.values = nn.ModuleDict({"a": nn.Linear(8, 1)})
            self.policy = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

        def forward(self, x: Tensor) -> tuple:
            x = self.body(x)
            logits = [head(x) for head in self.heads]
            value = torch.tanh(self.values["a"](x)).squeeze(-1)
            return logits, value, self.policy(x)

    expected = ["heads.0.weight", "heads.1.weight", "values.a.weight", "policy.2.weight"]
    assert heads_of(ManyHeads()) == expected


def test_the_head_of_a_translation_model_with_a_larger_source_vocabulary() -> None:
    class Translation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
            self.source, self.target = nn.Embedding(90, 8), nn.Embedding(60, 8)
            self.generator = nn.Linear(8, 60)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            return self.generator(self.transformer(self.source(source), self.target(target)))

    assert heads_of(Translation()) == ["generator.weight"]


def test_the_classifier_of_a_convolutional_net() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))
    assert heads_of(model) == ["3.weight"]


def test_a_last_pipeline_stage_has_its_head_and_a_middle_one_has_none() -> None:
    class Stage(nn.Module):
        def __init__(self, last: bool) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"2": Block(), "3": Block()})
            self.norm = nn.RMSNorm(8) if last else None
            self.output = nn.Linear(8, 300) if last else None

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers.values():
                x = layer(x)
            x = self.norm(x) if self.norm else x
            return self.output(x) if self.output else x

    assert heads_of(Stage(last=True)) == ["output.weight"]
    assert heads_of(Stage(last=False)) == []


def test_what_ends_in_the_residual_stream_or_a_norm_has_no_head() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
    for model in (
        Block(),
        Block(normed=True),
        layer,
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
    ):
        assert heads_of(model) == []
    assert heads_of(nn.Linear(4, 6)) == []


def test_a_matrix_of_its_own_that_ends_the_path_is_a_head_stored_as_it_is_used() -> None:
    class Codebooks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 8, 20))

        def forward(self, x: Tensor) -> Tensor:
            parts = [F.linear(x[:, i], self.weight[i].T) for i in range(3)]
            return torch.stack(parts, dim=1)

    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.codes = Block(), Codebooks()

        def forward(self, x: Tensor) -> Tensor:
            return self.codes(hidden := self.body(x)) if x is not None else hidden

    found = {a.name: a for a in assign_roles(Speech())}
    assert found["codes.weight"].role == Role.HEAD
    assert found["codes.weight"].matrices is not None and found["codes.weight"].matrices.transposed


def on_meta(name: str, **changes: object) -> nn.Module:
    import transformers as hf

    kind = getattr(hf, name)
    with torch.device("meta"):
        return kind(kind.config_class(**changes))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LlamaForSequenceClassification", ["score.weight"]),
        ("BertForPreTraining", ["cls.seq_relationship.weight"]),
        ("RobertaForSequenceClassification", ["classifier.out_proj.weight"]),
        ("BertForQuestionAnswering", ["qa_outputs.weight"]),
        ("Wav2Vec2ForCTC", ["lm_head.weight"]),
        ("ViTForImageClassification", ["classifier.weight"]),
        ("ResNetForImageClassification", ["classifier.1.weight"]),
        ("BertModel", []),
        ("T5Model", []),
        ("LlamaModel", []),
        ("FSMTForConditionalGeneration", ["model.decoder.output_projection.weight"]),
        (
            "CsmForConditionalGeneration",
            ["lm_head.weight", "depth_decoder.codebooks_head.weight"],
        ),
    ],
)
def test_the_heads_of_transformers(name: str, expected: list[str]) -> None:
    assert heads_of(on_meta(name)) == expected


def test_a_getter_that_raises_anything_does_not_crash() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))

        def get_input_embeddings(self) -> nn.Module:
            return self.missing.get_input_embeddings()

        def get_output_embeddings(self) -> nn.Module:
            raise KeyError("lm_head")

    found = {a.name: a.role for a in assign_roles(Wrapper())}
    assert found["inner.0.weight"] == Role.EMBEDDING
