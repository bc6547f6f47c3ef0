from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

from muonscale.errors import LayoutError
from muonscale.optim.matrices.spec import MatrixSpec, matrix_shapes
from muonscale.optim.parameters.roles import Role, RoleAssignment, assign_roles

Build = Callable[[str], nn.Module]


def roles_of(model: nn.Module) -> dict[str, RoleAssignment]:
    return {a.name: a for a in assign_roles(model)}


def matrices_in(model: nn.Module, *roles: Role) -> int:
    return sum(
        n
        for a in assign_roles(model)
        if a.role in roles and a.matrices
        for n, _, _ in matrix_shapes(a.parameter.shape, a.matrices)
    )


KINDS = [
    "llama",
    "llama_tied",
    "gpt2",
    "qwen3",
    "gemma3",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_exactly_one_role(kind: str, build_lm: Build) -> None:
    model = build_lm(kind)
    found = assign_roles(model)
    names = [name for name, _ in model.named_parameters()]
    assert [a.name for a in found] == names
    assert len({id(a.parameter) for a in found}) == len(names)


@pytest.mark.parametrize(
    ("kind", "hidden", "routers", "embeddings", "heads"),
    [
        ("llama", 2 * 7, 0, 1, 1),
        ("llama_tied", 2 * 7, 0, 1, 0),
        # c_attn holds q, k, v; then c_proj and the two of the MLP
        ("gpt2", 2 * (3 + 3), 0, 2, 0),
        ("qwen3", 2 * 7, 0, 1, 1),
        ("gemma3", 2 * 7, 0, 1, 0),
        ("mixtral", 2 * (4 + 4 * 3), 2, 1, 1),
        ("qwen3_moe", 2 * (4 + 4 * 3), 2, 1, 1),
        ("gpt_oss", 2 * (4 + 4 * 3), 2, 1, 1),
        # q, kv_a, kv_b, o; a dense MLP, then experts and one shared one
        ("deepseek_v3", 2 * 4 + 3 + 4 * 3 + 3, 1, 1, 1),
    ],
)
def test_matrices_are_counted_by_role(
    kind: str, hidden: int, routers: int, embeddings: int, heads: int, build_lm: Build
) -> None:
    model = build_lm(kind)
    found = {role: matrices_in(model, role) for role in Role}
    assert found == {
        Role.HIDDEN: hidden,
        Role.ROUTER: routers,
        Role.EMBEDDING: embeddings,
        Role.HEAD: heads,
        Role.NORM: 0,
        Role.CONVOLUTION: 0,
        Role.UNKNOWN: 0,
    }


def test_gpt2_attention_is_three_transposed_matrices(build_lm: Build) -> None:
    found = roles_of(build_lm("gpt2"))
    split = MatrixSpec(transposed=True, splits=(16, 16, 16))
    assert found["transformer.h.0.attn.c_attn.weight"].matrices == split
    assert found["transformer.h.0.attn.c_proj.weight"].matrices == MatrixSpec(transposed=True)
    assert found["transformer.h.0.mlp.c_fc.weight"].matrices == MatrixSpec(transposed=True)
    assert found["transformer.wte.weight"].aliases == ("transformer.wte.weight", "lm_head.weight")
    assert "lm_head" in found["transformer.wte.weight"].why


def test_experts_follow_the_flags_of_their_module(build_lm: Build) -> None:
    mixtral = roles_of(build_lm("mixtral"))
    assert mixtral["model.layers.0.mlp.experts.gate_up_proj"].matrices == MatrixSpec(
        splits=(24, 24)
    )
    assert mixtral["model.layers.0.mlp.experts.down_proj"].matrices == MatrixSpec()
    oss = roles_of(build_lm("gpt_oss"))
    interleaved = MatrixSpec(transposed=True, splits=(24, 24), groups=24)
    assert oss["model.layers.0.mlp.experts.gate_up_proj"].matrices == interleaved
    assert oss["model.layers.0.mlp.experts.down_proj"].matrices == MatrixSpec(transposed=True)
    assert oss["model.layers.0.mlp.experts.gate_up_proj_bias"].role == Role.NORM


def test_roles_do_not_depend_on_names() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(8, 8, bias=False)
            self.router_norm_bias = nn.Linear(8, 8, bias=False)
            self.linear = nn.Embedding(30, 8)
            self.hidden = nn.Linear(8, 30, bias=False)

    found = {name: a.role for name, a in roles_of(Odd()).items()}
    assert found == {
        "lm_head.weight": Role.HIDDEN,
        "router_norm_bias.weight": Role.HIDDEN,
        "linear.weight": Role.EMBEDDING,
        "hidden.weight": Role.HEAD,
    }


def test_a_tied_linear_is_an_embedding_wherever_it_comes_first() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 30, bias=False)
            self.body = nn.Linear(8, 8)
            self.tokens = nn.Embedding(30, 8)
            self.out.weight = self.tokens.weight

    found = roles_of(Tied())
    assert found["out.weight"].role == Role.EMBEDDING
    assert Counter(a.role for a in found.values())[Role.HEAD] == 0


def test_only_the_last_linear_is_the_head_where_the_vocabulary_is_also_a_width() -> None:
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    roles = [a.role for a in assign_roles(model) if a.matrices]
    assert roles == [Role.EMBEDDING, Role.HIDDEN, Role.HIDDEN, Role.HEAD]


def test_every_linear_over_the_vocabulary_is_a_head_otherwise() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9), nn.Linear(4, 4), nn.Linear(4, 9))
    roles = [a.role for a in assign_roles(model) if a.matrices]
    assert roles == [Role.EMBEDDING, Role.HEAD, Role.HIDDEN, Role.HEAD]


def test_a_linear_beside_as_many_experts_is_a_router() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choose = nn.Linear(8, 3, bias=False)
            self.other = nn.Linear(8, 5, bias=False)
            self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))

    found = {name: a.role for name, a in roles_of(Block()).items()}
    assert found.pop("choose.weight") == Role.ROUTER
    assert set(found.values()) == {Role.HIDDEN}


def test_vectors_in_disguise_and_kernels_hold_no_hidden_matrix() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.token = nn.Parameter(torch.ones(1, 1, 8))
            self.norm = nn.LayerNorm((4, 8))
            self.conv = nn.Conv1d(8, 8, 3, groups=8, bias=False)
            self.low_rank = nn.Linear(8, 1, bias=False)
            self.attention = nn.MultiheadAttention(8, 2, bias=False)

    found = roles_of(Parts())
    roles = {name: a.role for name, a in found.items()}
    assert roles["scale"] == roles["token"] == roles["norm.weight"] == Role.NORM
    assert roles["conv.weight"] == Role.CONVOLUTION
    assert roles["low_rank.weight"] == Role.HIDDEN
    assert found["attention.in_proj_weight"].matrices == MatrixSpec(splits=(8, 8, 8))


def test_flat_weights_are_refused_with_a_way_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(16))
    with pytest.raises(LayoutError, match=r"0\.weight.*FSDP2"):
        assign_roles(model)


def test_wrappers_are_seen_through(build_lm: Build) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    found = roles_of(Wrapper(build_lm("llama")))
    assert found["inner.lm_head.weight"].role == Role.HEAD
    assert found["inner.lm_head.weight"].why == "get_output_embeddings()"


def test_a_compiled_model_has_the_names_of_the_original() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    assert set(roles_of(torch.compile(model))) == set(roles_of(model))  # type: ignore[arg-type]


def test_a_tie_is_found_through_another_module_of_another_kind() -> None:
    class Tail(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.project = weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(30, 8)
            self.body = nn.Linear(8, 8, bias=False)
            self.tail = Tail(self.table.weight)

    found = roles_of(Model())
    assert set(found) == {"table.weight", "body.weight"}
    assert found["table.weight"].role == Role.EMBEDDING
    assert found["table.weight"].aliases == ("table.weight", "tail.project")
    assert found["table.weight"].why == "embedding, tied to tail.project"


def test_an_embedding_of_ones_own_is_known_by_the_sizes_it_declares() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_embeddings, self.embedding_dim = 30, 8
            self.weight = nn.Parameter(torch.zeros(30, 8))

    found = roles_of(nn.Sequential(Table(), nn.Linear(8, 8), nn.Linear(8, 30)))
    assert found["0.weight"].role == Role.EMBEDDING
    assert found["2.weight"].role == Role.HEAD


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 8)
        self.positions = nn.Parameter(torch.zeros(16, 8))
        self.body = Body()
        self.out = nn.Linear(8, 30, bias=False)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Parameter(torch.zeros(1, 16, 8))
        self.mix = nn.Parameter(torch.zeros(16, 8))
        self.experts = nn.Parameter(torch.zeros(4, 8, 8))
        self.gain = nn.Parameter(torch.zeros(1, 8))


def test_bare_parameters_are_tables_beside_an_embedding_or_under_a_leading_one() -> None:
    found = roles_of(Positions())
    roles = {name: str(a.role) for name, a in found.items()}
    assert roles == {
        "tokens.weight": "embedding",
        "positions": "embedding",
        "body.patches": "embedding",
        "body.mix": "unknown",
        "body.experts": "unknown",
        "body.gain": "norm",
        "out.weight": "head",
    }
    guessed = [name for name, a in found.items() if a.guessed]
    assert guessed == ["positions", "body.patches", "body.mix", "body.experts"]


def test_the_decay_of_a_state_space_is_no_matrix() -> None:
    import transformers as hf

    config = hf.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50, state_size=4)
    found = roles_of(hf.AutoModelForCausalLM.from_config(config))
    assert found["backbone.layers.0.mixer.A_log"].role == Role.NORM
    assert found["backbone.layers.0.mixer.conv1d.weight"].role == Role.CONVOLUTION
    assert found["backbone.layers.0.mixer.in_proj.weight"].role == Role.HIDDEN


def test_lora_is_a_hidden_matrix_for_each_of_its_factors_whatever_the_rank() -> None:
    class Lora(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.base = nn.Linear(8, 6, bias=False).requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(8, rank, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, 6, bias=False)})

    for rank in (1, 4):
        found = roles_of(nn.Sequential(Lora(rank)))
        for factor in ("A", "B"):
            assignment = found[f"0.lora_{factor}.default.weight"]
            assert (assignment.role, assignment.matrices) == (Role.HIDDEN, MatrixSpec())


def test_wrapped_models_have_the_names_of_the_original(single_process: None) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.nn.parallel import DistributedDataParallel

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    names = set(roles_of(model))
    wrapped = nn.Sequential(checkpoint_wrapper(model[0]), model[1])
    assert set(roles_of(wrapped)) == names
    assert set(roles_of(DistributedDataParallel(wrapped))) == names


def test_weights_that_deepspeed_has_taken_away_are_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    model[0].weight.data = torch.zeros(0)
    model[0].weight.ds_shape = torch.Size([4])
    with pytest.raises(LayoutError, match=r"0\.weight.*DeepSpeed"):
        assign_roles(model)


def test_the_flat_parameter_of_fsdp1_is_refused() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._flat_param = nn.Parameter(torch.zeros(32))
            self._flat_param._is_flat_param = True

    with pytest.raises(LayoutError, match=r"_flat_param.*FSDP1"):
        assign_roles(Wrapped())
