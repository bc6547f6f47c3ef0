from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonscale.optim.newton_schulz import orthogonalize

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}


def causal_lm(kind: str) -> nn.Module:
    """Return a tiny Hugging Face causal language model."""
    import transformers as hf

    moe = {"moe_intermediate_size": 12, "num_experts_per_tok": 2}
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: hf.LlamaConfig(**SMALL),
        "llama_tied": lambda: hf.LlamaConfig(**SMALL, tie_word_embeddings=True),
        "gpt2": lambda: hf.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32
        ),
        "qwen3": lambda: hf.Qwen3Config(**SMALL, head_dim=8),
        "gemma3": lambda: hf.Gemma3TextConfig(**SMALL, head_dim=8, pad_token_id=None),
        "mixtral": lambda: hf.MixtralConfig(**SMALL, num_local_experts=4),
        "qwen3_moe": lambda: hf.Qwen3MoeConfig(**SMALL, **moe, num_experts=4, head_dim=8),
        "gpt_oss": lambda: hf.GptOssConfig(**SMALL, num_local_experts=4, head_dim=8),
        "deepseek_v3": lambda: hf.DeepseekV3Config(
            **SMALL,
            **moe,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            n_shared_experts=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=None,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
        ),
    }
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(configs[kind]())


@pytest.fixture(autouse=True)
def products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare numbers in float32 whatever this machine is fast at."""
    monkeypatch.setattr(orthogonalize, "_fast_bf16", lambda device_type, index: False)


@pytest.fixture(scope="session")
def build_lm() -> Callable[[str], nn.Module]:
    return causal_lm


class Toy(nn.Module):
    """Embedding, two equal and two unequal matrices, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.up = nn.Linear(8, 24, bias=False)
        self.down = nn.Linear(24, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.second(self.first(self.tokens(ids)))
        return self.out(self.norm(x + self.down(self.up(x).relu())))


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(1)
    return Toy()


def randomize_gradients(module: nn.Module, seed: int) -> None:
    """Give every parameter a full-rank random gradient."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = noise.to(parameter.dtype)


@pytest.fixture(scope="session")
def set_gradients() -> Callable[[nn.Module, int], None]:
    return randomize_gradients


@pytest.fixture
def single_process() -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
