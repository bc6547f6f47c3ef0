from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from muonscale.errors import ConfigError
from muonscale.lab.models.attention import (
    LogitStatistics,
    attention_modules,
    hook_attention,
    logit_statistics,
)
from tests.lab.models.logits import CONFIGS, build, counted, eager_logits, ids


def hearing(model: Any, batch: torch.Tensor, **call: Any) -> list[LogitStatistics]:
    modules = list(attention_modules(model).values())
    found: dict[int, LogitStatistics] = {}

    def listen(module: Any, statistics: Any) -> None:
        found[modules.index(module)] = statistics()

    with hook_attention(model, listen), torch.no_grad():
        model(input_ids=batch, use_cache=False, **call)
    return [found[number] for number in range(len(modules))]


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_that_eager_attention_takes_the_softmax_of(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = hearing(build(kind), ids())
    expected = eager_logits(build(kind, "eager"), ids(), monkeypatch)
    shares = []
    for statistics, logits in zip(found, expected, strict=True):
        largest, above, pairs = counted(logits)
        # Norms and softmax are in float32 even in a float64 model.
        torch.testing.assert_close(statistics.largest_H, largest, rtol=1e-5, atol=1e-5)
        assert float(statistics.above) == above
        assert float(statistics.pairs) == pairs
        shares.append(above / pairs)
    assert 0 < max(shares) < 1  # there is something to count


@pytest.mark.parametrize("kind", ["llama_grouped", "gemma3", "gpt2"])
def test_eager_attention_can_be_recorded_too_and_outputs_are_unchanged(kind: str) -> None:
    for attention in ("sdpa", "eager"):
        model = build(kind, attention)
        with torch.no_grad():
            expected = model(input_ids=ids(), use_cache=False).logits
            with hook_attention(model, lambda module, statistics: None):
                found = model(input_ids=ids(), use_cache=False).logits
        assert torch.equal(found, expected)
        assert model.config._attn_implementation == attention
    with hook_attention(model, lambda module, statistics: None):
        assert model.config._attn_implementation != attention


def test_padding_is_not_counted() -> None:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    found = hearing(build("llama_grouped"), ids(), attention_mask=mask)
    # Five tokens of the first sequence see 1 to 5 keys; the others are whole.
    assert [float(layer.pairs) for layer in found] == [4 * (15 + 45 + 45)] * 2


def naive(
    query: torch.Tensor, key: torch.Tensor, window: int | None
) -> tuple[list[float], int, int]:
    B, H, T, _ = query.shape
    share = H // key.shape[1]
    largest, above, pairs = [], 0, 0
    for h in range(H):
        seen = [
            float(query[b, h, t].double() @ key[b, h // share, s].double()) * 3
            for b in range(B)
            for t in range(T)
            for s in range(t + 1)
            if window is None or t - s < window
        ]
        largest.append(max(seen))
        above += sum(x > 100 for x in seen)
        pairs += len(seen)
    return largest, above, pairs


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("block_bytes", [1, 300, 500, 2000, 2**26])
def test_blocks_of_any_size_give_the_same(window: int | None, block_bytes: int) -> None:
    torch.manual_seed(0)
    query, key = 5 * torch.randn(3, 4, 7, 8), 5 * torch.randn(3, 2, 7, 8)
    found = logit_statistics(query, key, scaling=3.0, window=window, block_bytes=block_bytes)
    largest, above, pairs = naive(query, key, window)
    assert found.largest_H.tolist() == pytest.approx(largest, rel=1e-5)
    assert (float(found.above), float(found.pairs)) == (above, pairs)


def test_memory_is_bounded_by_the_block() -> None:
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend(t.numel() for t in [out] if isinstance(t, torch.Tensor))
            return out

    query, key = torch.randn(4, 4, 64, 2), torch.randn(4, 4, 64, 2)
    with Watch():
        logit_statistics(query, key, scaling=1.0, block_bytes=4 * 4 * 64 * 8)  # 8 queries
    assert 4 * 64 * 8 in made and max(made) <= max(4 * 64 * 8, query.numel())


def test_negative_logits_and_a_soft_cap() -> None:
    query, key = torch.ones(1, 1, 3, 2), -torch.ones(1, 1, 3, 2)
    assert logit_statistics(query, key, scaling=2.0).largest_H.tolist() == [-4.0]
    capped = logit_statistics(query, -key, scaling=100.0, softcap=50.0)
    assert capped.largest_H.item() == pytest.approx(50 * float(torch.tensor(4.0).tanh()))
    assert float(capped.above) == 0


def test_16_bit_queries_are_multiplied_in_float32() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 5, 8).bfloat16(), torch.randn(2, 2, 5, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logit_statistics(query, key, scaling=3.0)
    assert found.largest_H.tolist() == pytest.approx(naive(query, key, None)[0], rel=1e-5)


def test_attention_that_cannot_be_recorded_is_refused_by_name() -> None:
    config = hf.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=50)
    model = hf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=r"model_type 'bloom' \(BloomForCausalLM\)"):
        attention_modules(model)


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_logits_that_are_seen_can_be_had(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = build(kind), []
    with (
        hook_attention(model, lambda module, attention: found.append(attention.logits())),
        torch.no_grad(),
    ):
        model(input_ids=ids(), use_cache=False)
    for logits, expected in zip(
        found, eager_logits(build(kind, "eager"), ids(), monkeypatch), strict=True
    ):
        seen = expected[expected > torch.finfo(expected.dtype).min / 2]
        torch.testing.assert_close(
            logits.sort().values, seen.flatten().sort().values, rtol=1e-4, atol=1e-3
        )
