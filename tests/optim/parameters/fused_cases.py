"""How each module of transformers that the table of fused weights names is built, small, and run."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.optim.parameters.data_flow import parts_of

Inputs = Callable[[nn.Module], dict[str, Any]]

SMALL = {
    "hidden_size": 32, "embed_dim": 32, "d_model": 32, "n_embd": 32, "intermediate_size": 24,
    "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "d_head": 8,
}  # fmt: skip
"""Set on every configuration that has them."""


@dataclass(frozen=True)
class Case:
    """Where one class differs from what is done for every class."""

    family: str = ""
    """Folder of its file; the first one with such a class if empty."""
    config: str = ""
    """Class of its configuration; the one that its constructor is annotated with if empty."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Set on its configuration afterwards."""
    options: Callable[[], dict[str, Any]] = dict
    """Arguments of its configuration."""
    init: dict[str, Any] = field(default_factory=dict)
    """Arguments of its constructor."""
    inputs: Inputs | None = None
    """From the module to the arguments of its forward pass."""
    through: tuple[str, ...] = ()
    """Operations after which the output is still the projection's, feature by feature."""
    compare: str = "equal"
    """"equal"; "finer" if a matrix is cut further, as in heads; "some" if besides, not all parts can
    be seen; "coarser" if several matrices leave the module together."""


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def only(*shape: int, **more: Any) -> Inputs:
    """The first argument of the forward pass is a random tensor; the others are given."""

    def inputs(module: nn.Module) -> dict[str, Any]:
        first = next(iter(inspect.signature(module.forward).parameters))
        return {first: x(*shape), **more}

    return inputs


def rotary(size: int, batch: int = 2, tokens: int = 8) -> tuple[Tensor, Tensor]:
    return x(batch, tokens, size), x(batch, tokens, size) + 0.1


def _experts(module: nn.Module) -> dict[str, Any]:
    chosen = torch.arange(16).remainder(4).view(8, 2)
    return {
        "hidden_states": x(8, 32), "top_k_index": chosen, "top_k_weights": torch.ones(8, 2),
    }  # fmt: skip


MAMBA2 = {
    "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 2, "state_size": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 2,
    "mamba_d_state": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8,
    "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 2, "mamba_d_ssm": None,
    "chunk_size": 4, "mamba_chunk_size": 4,
}  # fmt: skip
POINTS = {
    "sequence_dim": 32, "pairwise_dim": 16, "ipa_dim": 4, "num_heads_ipa": 3, "num_qk_points": 2,
    "num_v_points": 5, "inf": 1e5, "epsilon": 1e-8,
}  # fmt: skip
PROJECTOR = {
    "alignment_intermediate_size": 48, "adapter_layer_norm_eps": 1e-6,
    "vision_config.hidden_size": 32, "text_config.hidden_size": 32,
}  # fmt: skip
VISION_32 = only(2, 4, 4, 32)
DEEPSEEK_V4 = {
    "head_dim": 16, "q_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 8, "o_groups": 2,
    "o_lora_rank": 8, "layer_types": ["sliding_attention"],
}  # fmt: skip


def _scaled_input(module: nn.Module) -> dict[str, Any]:
    module.mup_vector = torch.ones(())  # the model sets it
    return {"hidden_states": x(2, 8, 32)}


def _diffusion(module: nn.Module) -> dict[str, Any]:
    return {"hidden_states": x(2, 32), "condition": x(2, 32)}


def _compressor(module: nn.Module) -> dict[str, Any]:
    return {
        "hidden_states": x(2, 256, 32), "q_residual": x(2, 256, 16), "cache": None, "layer_idx": 0,
        "position_ids": torch.arange(256).expand(2, -1),
    }  # fmt: skip


def _xlnet(module: nn.Module) -> dict[str, Any]:
    return {
        "h": x(8, 2, 32), "g": None, "attn_mask_h": None, "attn_mask_g": None, "r": x(16, 2, 32),
        "seg_mat": None,
    }  # fmt: skip


def _window_attention(config: str) -> Case:
    return Case(config=config, init={"window_size": 0}, inputs=VISION_32)


def _points(module: nn.Module) -> dict[str, Any]:
    home: Any = importlib.import_module("transformers.models.esm.openfold_utils")
    frames = home.Rigid.identity((1, 6), requires_grad=False)
    return {"s": x(1, 6, 32), "z": x(1, 6, 6, 16), "r": frames, "mask": torch.ones(1, 6)}


def _backbone() -> dict[str, Any]:
    import transformers

    small = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return {"use_timm_backbone": False, "backbone_config": small}


def _image(module: Any) -> dict[str, Any]:
    module.decoder.class_embed = nn.ModuleList([nn.Linear(32, 3)])  # the model with heads sets them
    module.decoder.bbox_embed = nn.ModuleList([nn.Linear(32, 4)])
    return {"pixel_values": x(1, 3, 256, 256)}


CASES: dict[str, Case] = {
    "MptAttention": Case(inputs=only(2, 8, 32, position_bias=torch.zeros(4, 8, 8))),
    "ModernBertAttention": Case(
        init={"layer_idx": 0}, inputs=only(2, 8, 32, position_embeddings=rotary(8))
    ),
    "LayoutLMv2SelfAttention": Case(
        fields={"fast_qkv": True, "has_relative_attention_bias": False,
                "has_spatial_attention_bias": False},
        inputs=only(2, 8, 32, attention_mask=torch.zeros(2, 1, 1, 8, dtype=torch.bool)),
        through=("add",),
    ),
    "BlipAttention": Case(config="BlipVisionConfig"),
    "Blip2Attention": Case(config="Blip2VisionConfig"),
    "InstructBlipAttention": Case(config="InstructBlipVisionConfig"),
    "InstructBlipVideoAttention": Case(config="InstructBlipVideoVisionConfig"),
    "DeepseekOcr2SamVisionAttention": _window_attention("DeepseekOcr2SamVisionConfig"),
    "GotOcr2VisionAttention": _window_attention("GotOcr2VisionConfig"),
    "PPFormulaNetVisionAttention": _window_attention("PPFormulaNetVisionConfig"),
    "SamVisionAttention": _window_attention("SamVisionConfig"),
    "SamHQVisionAttention": _window_attention("SamHQVisionConfig"),
    "SLANeXtVisionAttention": _window_attention("SLANeXtVisionConfig"),
    "UnlimitedOcrSamVisionAttention": _window_attention("UnlimitedOcrSamVisionConfig"),
    "SegGptAttention": Case(inputs=VISION_32),
    "VitDetAttention": Case(inputs=VISION_32),
    "Sam2MultiScaleAttention": Case(inputs=VISION_32),
    "Florence2VisionChannelAttention": Case(fields={"embed_dim": [32], "num_heads": [4], "num_groups": [4]}),
    "Florence2VisionWindowAttention": Case(
        fields={"embed_dim": [32], "num_heads": [4]}, inputs=only(2, 12, 12, 32)
    ),
    "DbrxAttention": Case(
        config="DbrxConfig",
        options=lambda: {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 100.0}},
        inputs=only(2, 8, 32, position_embeddings=rotary(8)),
        through=("clamp",),
    ),
    "BloomAttention": Case(
        inputs=only(2, 8, 32, residual=x(2, 8, 32), alibi=torch.zeros(8, 1, 8),
                    attention_mask=torch.zeros(2, 1, 8, 8)),
    ),
    "GPTNeoXAttention": Case(
        inputs=only(2, 8, 32, attention_mask=None, position_embeddings=rotary(8)),
        fields={"rotary_pct": 1.0},
    ),
    "GPTNeoXJapaneseAttention": Case(
        inputs=only(2, 8, 32, attention_mask=None, position_embeddings=rotary(8),
                    position_ids=torch.arange(8)[None]),
        fields={"rotary_pct": 1.0},
    ),
    "PersimmonAttention": Case(
        fields={"qk_layernorm": False, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
        inputs=only(2, 8, 32, position_embeddings=rotary(8)),
    ),
    "DisentangledSelfAttention": Case(
        family="deberta", inputs=only(2, 8, 32, attention_mask=torch.ones(2, 1, 8, 8)),
        through=("add",),
    ),
    "EsmFoldSelfAttention": Case(init={"embed_dim": 32, "num_heads": 4, "head_width": 8}),
    "LevitAttention": Case(
        init={"hidden_sizes": 32, "key_dim": 8, "num_attention_heads": 4, "attention_ratio": 2,
              "resolution": 4},
        inputs=only(2, 16, 32),
        through=("native_batch_norm", "_native_batch_norm_legit_no_training"),
    ),
    "LevitAttentionSubsample": Case(
        init={"input_dim": 32, "output_dim": 48, "key_dim": 8, "num_attention_heads": 4,
              "attention_ratio": 2, "stride": 2, "resolution_in": 4, "resolution_out": 2},
        inputs=only(2, 16, 32),
        through=("native_batch_norm", "_native_batch_norm_legit_no_training"),
    ),
    "FalconAttention": Case(
        fields={"new_decoder_architecture": True, "num_kv_heads": 2},
        inputs=only(2, 8, 32, alibi=None, attention_mask=torch.zeros(1, 1, 8, 8),
                    position_embeddings=rotary(8)),
    ),
    "GPTBigCodeAttention": Case(fields={"multi_query": False}),
    "CodeGenAttention": Case(
        fields={"rotary_dim": 8},
        inputs=only(2, 8, 32, position_embeddings=rotary(4)),
    ),
    "EvollaSequenceCompressorAttention": Case(
        init={"dim": 32}, inputs=only(2, 8, 32, latents=x(2, 3, 32), mask=torch.ones(2, 11)),
    ),
    "GraniteSpeechConformerAttention": Case(
        fields={"hidden_dim": 32, "dim_head": 8, "context_size": 8},
        inputs=only(2, 8, 32, attention_dists=torch.zeros(8, 8, dtype=torch.long)),
    ),
    "GraniteSpeechPlusConformerAttention": Case(
        fields={"hidden_dim": 32, "dim_head": 8, "context_size": 8},
        inputs=only(2, 8, 32, attention_dists=torch.zeros(8, 8, dtype=torch.long)),
    ),
    "EsmFoldInvariantPointAttention": Case(
        config="EsmFoldConfig",
        fields=POINTS,
        inputs=_points, through=("mul", "add"), compare="some",
    ),
    "EsmFoldInvariantPointAttention.linear_q_points": Case(
        config="EsmFoldConfig", fields=POINTS, inputs=_points, compare="finer"
    ),
    "PPDocLayoutV2GlobalPointer": Case(config="PPDocLayoutV2ReadingOrderConfig"),
    "Qwen4ExpTextQSAIndexer": Case(
        fields={"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                "indexer_budget": 4, "indexer_compress_ratio": 2},
        inputs=only(2, 8, 32, position_embeddings=rotary(8), cache=None,
                    attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool)),
    ),
    "Qwen3_5Attention": Case(config="Qwen3_5TextConfig"),
    "Qwen3_5MoeAttention": Case(config="Qwen3_5MoeTextConfig"),
    "Qwen4ExpTextAttention": Case(
        fields={"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                "indexer_budget": 4, "indexer_compress_ratio": 2},
        inputs=only(2, 8, 32, position_embeddings=rotary(8), cache=None,
                    attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool)),
    ),
    "Qwen3_5GatedDeltaNet": Case(config="Qwen3_5TextConfig"),
    "Qwen3_5MoeGatedDeltaNet": Case(config="Qwen3_5MoeTextConfig"),
    "AXK2Attention": Case(
        fields={"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 6, "num_key_value_heads": 4,
                "qk_rope_head_dim": 4, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8},
        inputs=only(2, 8, 32, position_embeddings=rotary(4), position_ids=torch.arange(8)[None],
                    attention_mask=torch.zeros(2, 1, 8, 8)),
        compare="finer",
    ),
    "xLSTMLayer": Case(fields={"weight_mode": "fused"}, through=("div", "tanh", "mul")),
    "xLSTMFeedForward": Case(fields={"weight_mode": "fused"}),
    "xLSTMFeedForward.proj_up_gate": Case(fields={"weight_mode": "single"}),
    "DeformableDetrModel": Case(
        fields={
            "two_stage": True, "with_box_refine": True, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "two_stage_num_proposals": 5,
            "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 5,
        },
        options=_backbone,
        inputs=_image, through=("native_layer_norm",),
    ),
    "MvpPrompt": Case(
        fields={"prompt_length": 6, "prompt_mid_dim": 16},
        init={"num_layers": 3, "num_heads": 4},
        inputs=lambda m: {"prompt_ids": torch.arange(6)}, compare="coarser",
    ),
    "Phi4MultimodalMLP": Case(config="Phi4MultimodalConfig"),
    "Glm4vTextMLP": Case(config="Glm4vTextConfig"),
    "GlmImageTextMLP": Case(config="GlmImageTextConfig"),
    "GlmOcrTextMLP": Case(config="GlmOcrTextConfig"),
    "Zamba2MLP": Case(
        init={"num_fwd_mem_blocks": 1, "block_id": 0},
        inputs=lambda m: {"hidden_state": x(2, 8, 32), "layer_idx": next(iter(m.layer_dic))},
        through=("add",),
    ),
    "DiaMLP": Case(config="DiaDecoderConfig"),
    "GraniteMoeSharedMLP": Case(fields={"shared_intermediate_size": 24}),
    "GraniteMoeSWAMLP": Case(fields={"shared_intermediate_size": 24}),
    "JetMoeMoE": Case(fields={"num_local_experts": 2}),
    "MoshiGatingMLP": Case(config="MoshiConfig", fields={"ffn_dim": 48}),
    "KyutaiSpeechToTextGatingMLP": Case(
        config="KyutaiSpeechToTextConfig", fields={"ffn_dim": 48}
    ),
    "AyaVisionMultiModalProjector": Case(fields=PROJECTOR, inputs=only(1, 16, 32)),
    "Cohere2VisionMultiModalProjector": Case(fields=PROJECTOR, inputs=only(1, 16, 32)),
    "ClvpGatedLinearUnit": Case(config="ClvpEncoderConfig"),
    "MoonshineDecoderMLP": Case(init={"hidden_act": "silu"}, config="MoonshineConfig"),
    "MoonshineStreamingDecoderMLP": Case(
        init={"hidden_act": "silu"}, config="MoonshineStreamingConfig"
    ),
    "DFineGate": Case(
        inputs=only(2, 8, 32, hidden_states=x(2, 8, 32)), through=("sigmoid",)
    ),
    "Deimv2Gate": Case(
        inputs=only(2, 8, 32, hidden_states=x(2, 8, 32)), through=("sigmoid",)
    ),
    "WavLMAttention": Case(
        init={"embed_dim": 32, "num_heads": 4, "has_relative_position_bias": True},
        inputs=only(2, 8, 32), through=("sum", "sigmoid"), compare="some"),
    "Lfm2MoeShortConv": Case(fields={"layer_types": ["conv"]}),
    "Lfm3VlVisionShortConv": Case(inputs=only(16, 32, grid_thw=[[1, 4, 4]])),
    "MambaMixer": Case(fields={"intermediate_size": 64, "expand": 2}, inputs=only(2, 8, 32)),
    "FalconMambaMixer": Case(
        fields={"intermediate_size": 64, "expand": 2},
        init={"initialize_mixer_weights": False}, inputs=only(2, 8, 32),
    ),
    "JambaMambaMixer": Case(inputs=only(2, 8, 32)),
    "ZambaMambaMixer": Case(
        fields={"n_mamba_heads": 1, "mamba_dt_rank": 4, "mamba_d_state": 6},
        inputs=only(2, 8, 32),
    ),
    "Mamba2Mixer": Case(fields=MAMBA2),
    "BambaMixer": Case(fields=MAMBA2),
    "FalconH1Mixer": Case(fields=MAMBA2, inputs=_scaled_input, through=("mul",)),
    "NemotronHMamba2Mixer": Case(fields=MAMBA2, init={"layer_idx": 0}),
    "GraniteMoeHybridMambaLayer": Case(fields=MAMBA2),
    "Zamba2MambaMixer": Case(fields=MAMBA2, init={"layer_idx": 0}),
    "DeepseekV4Attention": Case(
        fields=DEEPSEEK_V4,
        inputs=only(2, 8, 32, position_ids=torch.arange(8)[None], attention_mask=None,
                    position_embeddings={"main": rotary(4), "compress": rotary(4)}),
    ),
    "DeepseekV4CSACompressor": Case(fields=DEEPSEEK_V4, inputs=_compressor, through=("add",)),
    "DeepseekV4HCACompressor": Case(fields=DEEPSEEK_V4, inputs=_compressor, through=("add",)),
    "DeepseekV4Indexer": Case(fields=DEEPSEEK_V4, inputs=_compressor, through=("add",)),
    "FocalNetModulation": Case(
        inputs=only(2, 4, 4, 32), init={"index": 0, "dim": 32}, compare="finer"
    ),
    "EsmFold2OuterProductMean": Case(
        inputs=lambda m: {
            "msa_states": x(1, 3, 4, m.input_proj.in_features),
            "msa_attention_mask": torch.ones(1, 3, 4),
        },
        through=("mul",),
    ),
    "EsmFold2TriangleMultiplicativeUpdate": Case(
        inputs=lambda m: {
            "pair_grid": x(1, 4, 4, m.dim), "visibility": torch.ones(1, 4, 4),
        },
        through=("sigmoid", "mul"), compare="some",
    ),
    "Qwen2_5_OmniAdaLayerNormZero": Case(
        init={"dim": 32}, inputs=only(2, 8, 32, emb=x(2, 32))
    ),
    "Qwen2_5_OmniAdaLayerNormZero_Final": Case(
        init={"dim": 32}, inputs=only(2, 8, 32, emb=x(2, 32))
    ),
    "VibeVoiceDiffusionHeadAdaLayerNorm": Case(config="VibeVoiceDiffusionHeadConfig", inputs=_diffusion),
    "VibeVoiceDiffusionHeadFinalLayer": Case(config="VibeVoiceDiffusionHeadConfig", inputs=_diffusion),
    "Kimi_K25MultimodalProjection": Case(
        fields={"vision_config.merge_kernel_size": (1, 1)}, inputs=only(2, 4, 1152)
    ),
    "PI0ActionTimeEmbedding": Case(
        inputs=lambda m: {
            "state": x(2, 32), "noise": x(2, 8, 32), "timestep": torch.tensor([0.1, 0.2]),
        },
    ),
    "Llama4TextExperts": Case(fields={"num_local_experts": 4}, inputs=only(32, 32)),
    "LongcatFlashExperts": Case(
        fields={"n_routed_experts": 4, "expert_ffn_hidden_size": 24}, inputs=_experts
    ),
    "Step3p7Experts": Case(
        config="Step3p7TextConfig",
        fields={"num_local_experts": 4, "moe_intermediate_size": 24}, inputs=_experts,
    ),
    "XLNetRelativeAttention": Case(inputs=_xlnet),
    "FunnelRelMultiheadAttention": Case(
        init={"block_index": 0},
        inputs=lambda m: {
            "query": x(2, 8, 32), "key": x(2, 8, 32), "value": x(2, 8, 32),
            "attention_inputs": ([[x(16, 32), x(16, 32)]], None, None, None),
        },
    ),
    "Gemma4AudioLightConv1d": Case(through=("clamp",)),
    "DeepseekV4HyperConnection": Case(inputs=lambda m: {"hidden_streams": x(2, 8, m.hc_mult, 32)}),
    "Glm5NextTextHyperConnection": Case(
        inputs=lambda m: {"hidden_streams": x(2, 8, m.hc_mult, 32)}
    ),
    "HYV4HyperConnection": Case(
        inputs=lambda m: {"hidden_streams": x(2, 8, m.hc_mult, 32)}, through=("mul",)
    ),
    "HYV4VLHyperConnection": Case(
        config="HYV4VLTextConfig", through=("mul",),
        inputs=lambda m: {"hidden_streams": x(2, 8, m.hc_mult, 32)},
    ),
}  # fmt: skip
"""By class, or by class and place where a place differs from the rest of its class."""


def case_of(cls: str, place: str = "") -> Case:
    """Return how a class is built and run to see what a projection in it holds."""
    return CASES.get(f"{cls}.{place}", CASES.get(cls, Case()))


@cache
def homes() -> dict[str, list[Path]]:
    """Return the files of transformers in which a class of a name is defined."""
    import transformers

    found: dict[str, list[Path]] = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for name in re.findall(r"^ *class (\w+)\(", path.read_text("utf-8"), re.M):
            found.setdefault(name, []).append(path)
    return found


def load(cls: str) -> tuple[type[nn.Module], Any]:
    """Return a class of transformers, and the module that defines it."""
    family = case_of(cls).family
    path = next(p for p in homes()[cls] if family in ("", p.parent.name))
    home = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
    return getattr(home, cls), home


def build(cls: str, case: Case) -> nn.Module:
    """Return a small module of a class of transformers, with random weights."""
    kind, home = load(cls)
    arguments = dict(case.init)
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if name in arguments or variable:
            continue
        if "config" in name:
            arguments[name] = _config(case, home, parameter.annotation)
        elif parameter.default is parameter.empty:
            arguments[name] = 0 if "idx" in name or "index" in name else 32
    torch.manual_seed(0)
    module = kind(**arguments)
    module.eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.1)
    return module


def _config(case: Case, home: Any, annotation: Any) -> Any:
    annotated = annotation if isinstance(annotation, str) else annotation.__name__
    import transformers

    name = case.config or annotated.split("|")[0].strip()
    kind = getattr(home, name, None) or getattr(transformers, name, None)
    if kind is None:
        kind = next(
            value for name, value in vars(home).items()
            if name.endswith("Config") and name not in ("PreTrainedConfig", "GenerationConfig")
        )  # fmt: skip
    config = kind(**case.options())
    for name, value in (SMALL | case.fields).items():
        if name in SMALL and name not in vars(config):
            continue
        *path, last = name.split(".")
        place = config
        for part in path:
            place = getattr(place, part)
        setattr(place, last, value)
    config._attn_implementation = "eager"
    return config


def inputs_of(case: Case, module: nn.Module, weight: Tensor) -> dict[str, Any]:
    """Return arguments for the forward pass; those that are not stated follow from its names."""
    if case.inputs:
        return case.inputs(module)
    names = inspect.signature(module.forward).parameters
    width, packed = weight.shape[-1], "cu_seqlens" in names
    given: dict[str, Any] = {}
    for name, parameter in names.items():
        optional = parameter.default is not parameter.empty and name != "position_embeddings"
        if optional or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if name == "cu_seqlens":
            given[name] = torch.tensor([0, 8], dtype=torch.int32)
        elif name == "position_embeddings":
            size = getattr(module, "head_dim", 8)
            cos, sin = rotary(size)
            given[name] = (cos[0], sin[0]) if packed else (cos, sin)
        elif "mask" in name:
            given[name] = None
        else:
            given[name] = x(8, width) if packed else x(2, 8, width)
    return given


def weight_of(cls: str, place: str) -> tuple[nn.Module, nn.Parameter]:
    """Return a small module of a class, and the weight of a projection in it or its own parameter."""
    module = build(cls, case_of(cls, place))
    found: Any = module
    for name in place.split("."):
        found = getattr(found, name)
    return module, found if isinstance(found, nn.Parameter) else found.weight


def parts_by_data_flow(
    case: Case, module: nn.Module, weight: nn.Parameter
) -> tuple[set[frozenset[int]], Tensor]:
    """Return the parts of a weight's features, and a tensor like the weight with their numbers."""
    through = ("silu", "convolution", *case.through)
    parts, features, axis = parts_of(
        weight, lambda: module(**inputs_of(case, module, weight)), through
    )
    flat = weight if weight.shape[axis] == features else weight.flatten(1)
    numbers = torch.arange(1, features + 1)
    numbers = numbers[:, None] if axis == -2 else numbers
    return parts, numbers.expand(flat.shape).reshape(weight.shape)
