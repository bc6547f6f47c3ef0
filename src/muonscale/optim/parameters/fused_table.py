"""Which parameters of transformers' models hold several matrices, or one stored otherwise.

`FUSED` is for projections: the class around the projection and what the projection is called in it
decide. `BARE_MATRICES` is for parameters that a class holds itself, without a linear layer. Every
entry was read off the forward pass: a weight is divided where the output of its product is cut
into parts that go different ways. A cut within a head, as for a partial rotary embedding, does not
count, and neither do the latent projections of multi-head latent attention. Low-rank adapters hold
one matrix each, also where they add to a weight that holds several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from muonscale.optim.matrices.spec import PLAIN, MatrixSpec, batch_shape

Read = Callable[[Any, int], MatrixSpec]
"""From the module named in the table, and the rows of a matrix, to how the rows are divided."""


@dataclass(frozen=True)
class Known:
    """What a parameter of a known class holds."""

    holds: str
    """Names of its matrices, in their order."""
    order: str
    """How the matrices follow each other, in words."""
    read: Read
    stored: MatrixSpec = PLAIN
    """Whether its axes are flattened or transposed."""

    def spec(self, module: nn.Module, shape: Sequence[int]) -> MatrixSpec:
        """Return how the matrices of a parameter of `shape` are stored."""
        _, rows, _ = batch_shape(shape, self.stored)
        flattened, transposed = self.stored.flattened, self.stored.transposed
        return replace(self.read(module, rows), flattened=flattened, transposed=transposed)


def _equal(holds: str, stored: MatrixSpec = PLAIN) -> Known:
    """Matrices of equal size, one after the other."""
    number = len(holds.split(", "))

    def read(module: Any, rows: int) -> MatrixSpec:
        return MatrixSpec(splits=(rows // number,) * number)

    return Known(holds, "stacked", read, stored)


def _sized(holds: str, sizes: Callable[[Any], tuple[int, ...]]) -> Known:
    """Matrices of the sizes that the module states, one after the other."""

    def read(module: Any, rows: int) -> MatrixSpec:
        return MatrixSpec(splits=sizes(module))

    return Known(holds, "stacked", read)


def _by_head(
    holds: str, heads: Callable[[Any], int], sizes: Callable[[Any], tuple[int, ...]] | None = None
) -> Known:
    """All matrices' rows for the first head, then for the second, and so on.

    Args:
        holds: names of the matrices.
        heads: from the module to the number of heads.
        sizes: from the module to the rows of each matrix for one head; equal if None.
    """

    def read(module: Any, rows: int) -> MatrixSpec:
        number, count = heads(module), len(holds.split(", "))
        each = sizes(module) if sizes else (rows // number // count,) * count
        return MatrixSpec(splits=tuple(number * size for size in each), groups=number)

    return Known(holds, "by head", read)


def _one(stored: MatrixSpec = PLAIN) -> Known:
    return Known("one matrix", "", lambda module, rows: PLAIN, stored)


ONE = _one()
"""One matrix, whatever its name says."""


def _attention(module: Any, rows: int) -> MatrixSpec:
    """All queries, then all keys, then all values; there may be fewer of these."""
    back = getattr(module, "o_proj", None) or module.out_proj
    others = (rows - back.in_features) // 2
    return MatrixSpec(splits=(back.in_features, others, others))


def _every_head(module: Any, rows: int) -> MatrixSpec:
    size = getattr(module, "head_dim", None) or module.head_size
    return MatrixSpec(splits=(rows // 3,) * 3, groups=rows // (3 * size))


def _falcon(module: Any, rows: int) -> MatrixSpec:
    """Queries that share a key and a value stand before these; one such group for multi-query."""
    if not module.new_decoder_architecture and not module.multi_query:
        return _every_head(module, rows)
    others = module.num_kv_heads * module.head_dim
    return MatrixSpec(splits=(rows - 2 * others, others, others), groups=module.num_kv_heads)


def _big_code(module: Any, rows: int) -> MatrixSpec:
    """Cross-attention has keys and values alone here, and a projection of its own for queries."""
    if module.is_cross_attention:
        return MatrixSpec(splits=(rows // 2,) * 2)
    if not module.multi_query:
        return _every_head(module, rows)
    return MatrixSpec(splits=(module.embed_dim, module.kv_dim, module.kv_dim))


def _delta_net_gated(module: Any, rows: int) -> MatrixSpec:
    keys, values = module.key_dim, module.value_dim
    return MatrixSpec(splits=(keys, keys, values, values), groups=module.num_k_heads)


def _state_space(module: Any) -> tuple[int, ...]:
    states = module.n_groups * module.ssm_state_size
    inner = module.intermediate_size
    return inner, inner, states, states, module.num_heads


def _selective(module: Any) -> tuple[int, ...]:
    return module.time_step_rank, module.ssm_state_size, module.ssm_state_size


def _hyper_connection(module: Any) -> tuple[int, ...]:
    streams = module.hc_mult
    return streams, streams, streams * streams


def _prompts(module: Any, rows: int) -> MatrixSpec:
    count = 2 * module.num_layers
    return MatrixSpec(splits=(rows // count,) * count)


def _points(module: Any) -> int:
    return 3 * module.num_heads  # x of all heads, then y, then z


_PROJECTIONS: list[tuple[Known, str]] = [
    (
        _equal("query, key, value"),
        """BarkSelfAttention.att_proj MptAttention.Wqkv ModernBertAttention.Wqkv
        LayoutLMv2SelfAttention.qkv_linear BlipAttention.qkv Blip2Attention.qkv
        InstructBlipAttention.qkv InstructBlipVideoAttention.qkv CohereCompassVisionAttention.qkv
        DeepseekOcr2SamVisionAttention.qkv Dots3NoteVisionAttention.qkv
        Ernie4_5_VLMoeVisionAttention.qkv Florence2VisionChannelAttention.qkv
        Florence2VisionWindowAttention.qkv Glm4vVisionAttention.qkv Glm4vMoeVisionAttention.qkv
        Glm5NextVisionAttention.qkv GlmImageVisionAttention.qkv GlmOcrVisionAttention.qkv
        GotOcr2VisionAttention.qkv HieraMaskUnitAttention.qkv MgpstrAttention.qkv
        PPFormulaNetVisionAttention.qkv PPOCRV5MobileRecAttention.qkv
        PPOCRV5ServerRecAttention.qkv PPOCRV6SmallRecAttention.qkv
        Qwen2_5_VLVisionAttention.qkv VisionAttention.qkv Qwen3_5VisionAttention.qkv
        Qwen3_5MoeVisionAttention.qkv Qwen3OmniMoeVisionAttention.qkv Qwen3VLVisionAttention.qkv
        Qwen3VLMoeVisionAttention.qkv Qwen4ExpVisionAttention.qkv SamVisionAttention.qkv
        Sam2MultiScaleAttention.qkv SamHQVisionAttention.qkv SegGptAttention.qkv
        SLANeXtVisionAttention.qkv TimesformerSelfAttention.qkv UnlimitedOcrSamVisionAttention.qkv
        VitDetAttention.qkv""",
    ),
    (
        Known("query, key, value", "stacked", _attention),
        "Phi3Attention.qkv_proj Phi4MultimodalAttention.qkv_proj DbrxAttention.Wqkv",
    ),
    (
        _sized("query, key, value", lambda m: (m.q_dim, m.kv_dim, m.kv_dim)),
        "Exaone4_5_VisionAttention.qkv",
    ),
    (
        Known("query, key, value", "by head", _every_head),
        """GPTNeoXAttention.query_key_value GPTNeoXJapaneseAttention.query_key_value
        BloomAttention.query_key_value PersimmonAttention.query_key_value
        MiniMaxLightningAttention.qkv_proj""",
    ),
    (
        _by_head("query, key, value", lambda m: m.num_attention_heads),
        "DisentangledSelfAttention.in_proj",
    ),
    (_by_head("query, key, value", lambda m: m.num_heads), "EsmFoldSelfAttention.proj"),
    (
        _by_head(
            "query, key, value",
            lambda m: m.num_attention_heads,
            lambda m: (m.key_dim, m.key_dim, m.attention_ratio * m.key_dim),
        ),
        "LevitAttention.queries_keys_values.linear",
    ),
    (
        Known("query, key, value", "by group of heads, or stacked for multi-query", _falcon),
        "FalconAttention.query_key_value",
    ),
    (
        Known(
            "query, key, value",
            "by head, or stacked for multi-query and cross-attention",
            _big_code,
        ),
        "GPTBigCodeAttention.c_attn",
    ),
    (
        Known(
            "query, value, key",
            "by quarter, for the four TPU cores it was trained on",
            lambda m, rows: MatrixSpec(splits=(rows // 3,) * 3, groups=4),
        ),
        "CodeGenAttention.qkv_proj",
    ),
    (
        _equal("key, value"),
        """JetMoeAttention.kv_proj EvollaSequenceCompressorAttention.to_kv
        GraniteSpeechConformerAttention.to_kv GraniteSpeechPlusConformerAttention.to_kv""",
    ),
    (
        _by_head("key, value", lambda m: m.num_heads),
        "EsmFoldInvariantPointAttention.linear_kv",
    ),
    (
        _by_head("key points, value points", _points, lambda m: (m.num_qk_points, m.num_v_points)),
        "EsmFoldInvariantPointAttention.linear_kv_points",
    ),
    (
        _by_head(
            "key, value",
            lambda m: m.num_attention_heads,
            lambda m: (m.key_dim, m.attention_ratio * m.key_dim),
        ),
        "LevitAttentionSubsample.keys_values.linear",
    ),
    (
        _equal("query, key"),
        """EsmFoldSequenceToPair.proj PPDocLayoutV2GlobalPointer.dense
        PPDocLayoutV3GlobalPointer.dense""",
    ),
    (
        _sized(
            "query, key",
            lambda m: (
                m.index_n_heads * m.index_head_dim,
                m.index_kv_heads * m.index_head_dim,
            ),
        ),
        "Qwen4ExpTextQSAIndexer.index_qk_proj",
    ),
    (
        _by_head("query, output gate", lambda m: m.config.num_attention_heads),
        """Qwen3NextAttention.q_proj Qwen3_5Attention.q_proj Qwen3_5MoeAttention.q_proj
        Qwen4ExpTextAttention.q_proj""",
    ),
    (
        _by_head(
            "query, output gate", lambda m: m.num_heads, lambda m: (m.qk_head_dim, m.v_head_dim)
        ),
        "AXK2Attention.q_gate_proj",
    ),
    (
        Known("query, key, value, output gate", "by key head", _delta_net_gated),
        "Qwen3NextGatedDeltaNet.in_proj_qkvz",
    ),
    (
        _by_head("write strength, decay", lambda m: m.num_k_heads),
        "Qwen3NextGatedDeltaNet.in_proj_ba",
    ),
    (
        _sized("query, key, value", lambda m: (m.key_dim, m.key_dim, m.value_dim)),
        """Qwen3_5GatedDeltaNet.in_proj_qkv Qwen3_5MoeGatedDeltaNet.in_proj_qkv
        Qwen4ExpTextGatedDeltaNet.in_proj_qkv LaraMiniGatedDeltaNet.in_proj_qkv""",
    ),
    (
        _sized("query, key, value, output gate", lambda m: (m.qk_dim, m.qk_dim, m.v_dim, m.v_dim)),
        "xLSTMLayer.qkv_opreact",
    ),
    (_equal("input gate, forget gate"), "xLSTMLayer.ifgate_preact"),
    (
        _equal("gate, up"),
        """Phi3MLP.gate_up_proj Phi4MultimodalMLP.gate_up_proj GlmMLP.gate_up_proj
        Glm4MLP.gate_up_proj Glm4vTextMLP.gate_up_proj GlmImageTextMLP.gate_up_proj
        GlmOcrTextMLP.gate_up_proj Zamba2MLP.gate_up_proj DiaMLP.gate_up_proj
        Dots3NoteAudioMLP.gate_up_proj EsmFold2SwiGLU.gate_up_proj
        MiniMaxM3VLDenseMLP.gate_up_proj GraniteMoeHybridMLP.input_linear
        GraniteMoeSharedMLP.input_linear GraniteMoeSWAMLP.input_linear JetMoeMoE.input_linear
        ModernBertMLP.Wi ModernBertDecoderMLP.Wi MoshiGatingMLP.fc1
        KyutaiSpeechToTextGatingMLP.fc1 xLSTMFeedForward.proj_up_gate_z""",
    ),
    (
        _equal("up, gate"),
        """Phi4MultimodalAudioMLP.gate_up_proj AyaVisionMultiModalProjector.linear_1
        Cohere2VisionMultiModalProjector.linear_1 ClvpGatedLinearUnit.proj MoonshineDecoderMLP.fc1
        MoonshineStreamingDecoderMLP.fc1 Gemma3nAudioConformerLightConv1d.linear_start
        Gemma4AudioLightConv1d.linear_start.linear
        GraniteSpeech5EncoderConvolutionModule.pointwise_lin1""",
    ),
    (
        _equal("gate of the residual, gate of the output"),
        "DFineGate.gate Deimv2Gate.gate",
    ),
    (_equal("position, content"), "DeformableDetrModel.pos_trans"),
    (
        Known("key and value of every layer", "stacked", _prompts),
        "MvpPrompt.prompt_trans.2",
    ),
    (_equal("first gate, second gate"), "WavLMAttention.gru_rel_pos_linear"),
    (
        _equal("B, C, x"),
        """Lfm2ShortConv.in_proj Lfm2MoeShortConv.in_proj Lfm3ShortConv.in_proj
        Lfm3VlVisionShortConv.in_proj""",
    ),
    (_equal("x, gate"), "MambaMixer.in_proj FalconMambaMixer.in_proj JambaMambaMixer.in_proj"),
    (
        Known(
            "x, gate",
            "row by row",
            lambda m, rows: MatrixSpec(splits=(rows // 2,) * 2, groups=rows // 2),
        ),
        "ZambaMambaMixer.in_proj",
    ),
    (
        _sized("dt, B, C", _selective),
        "MambaMixer.x_proj FalconMambaMixer.x_proj JambaMambaMixer.x_proj",
    ),
    (
        _sized("gate, x, B, C, dt", _state_space),
        """Mamba2Mixer.in_proj BambaMixer.in_proj FalconH1Mixer.in_proj
        NemotronHMamba2Mixer.in_proj GraniteMoeHybridMambaLayer.in_proj
        Zamba2MambaMixer.in_proj""",
    ),
    (
        Known(
            "one matrix for each group of heads",
            "stacked",
            lambda m, rows: MatrixSpec(heads=m.o_a_proj.n_groups),
        ),
        "DeepseekV4Attention.o_a_proj",
    ),
    (
        _equal("for the next window, for the current window"),
        """DeepseekV4CSACompressor.kv_proj DeepseekV4CSACompressor.gate_proj
        DeepseekV4Indexer.kv_proj DeepseekV4Indexer.gate_proj""",
    ),
    (
        _sized("query, context, gates", lambda m: (m.dim, m.dim, m.focal_level + 1)),
        "FocalNetModulation.projection_in",
    ),
    (_equal("left, right"), "EsmFold2OuterProductMean.input_proj"),
    (
        _equal("left, right, gate of left, gate of right"),
        "EsmFold2TriangleMultiplicativeUpdate.proj_bundle",
    ),
    (
        _equal(
            "shift of attention, scale of attention, gate of attention, shift of the MLP, "
            "scale of the MLP, gate of the MLP"
        ),
        "EsmFold2AtomLayer.adaln_linear Qwen2_5_OmniAdaLayerNormZero.linear",
    ),
    (
        _equal("shift, scale, gate"),
        """GradiumPhononTTSFlowResBlock.adaln_proj PocketTTSFlowResBlock.adaln_proj
        VibeVoiceDiffusionHeadAdaLayerNorm.linear""",
    ),
    (
        _equal("shift, scale"),
        """GradiumPhononTTSFlowFinalLayer.adaln_proj PocketTTSFlowFinalLayer.adaln_proj
        VibeVoiceDiffusionHeadFinalLayer.linear_1""",
    ),
    (_equal("scale, shift"), "Qwen2_5_OmniAdaLayerNormZero_Final.linear"),
    (
        _equal("magnitude, phase"),
        "NeuCodecISTFTHead.linear Xcodec2ISTFTHead.linear WavTokenizerISTFTHead.linear",
    ),
    (
        ONE,
        """BarkMLP.in_proj DeepseekV4Attention.kv_proj DeepseekV4HCACompressor.kv_proj
        DeepseekV4HCACompressor.gate_proj Kimi_K25MultimodalProjection.in_proj
        LaraMiniGatedDeltaNet.in_proj_z LaraMiniGatedDeltaNet.in_proj_b
        LaraMiniGatedDeltaNet.in_proj_a Qwen3_5GatedDeltaNet.in_proj_z
        Qwen3_5GatedDeltaNet.in_proj_b Qwen3_5GatedDeltaNet.in_proj_a
        Qwen3_5MoeGatedDeltaNet.in_proj_z Qwen3_5MoeGatedDeltaNet.in_proj_b
        Qwen3_5MoeGatedDeltaNet.in_proj_a Qwen4ExpTextGatedDeltaNet.in_proj_z
        Qwen4ExpTextGatedDeltaNet.in_proj_b Qwen4ExpTextGatedDeltaNet.in_proj_a
        PI0ActionTimeEmbedding.action_in_proj xLSTMFeedForward.proj_up_gate
        EsmFoldInvariantPointAttention.linear_q_points
        Zamba2MLP.gate_up_proj_adapter_list.*.*""",
    ),
]

_TRANSPOSED = MatrixSpec(transposed=True)
_HEADS_IN_THE_LAST_AXES = MatrixSpec(flattened=True, transposed=True)

_BARE: list[tuple[Known, str]] = [
    (_equal("gate, up", _TRANSPOSED), "Llama4TextExperts.gate_up_proj"),
    (_one(_TRANSPOSED), "Llama4TextExperts.down_proj"),
    (_equal("gate, up"), "LongcatFlashExperts.gate_up_proj Step3p7Experts.gate_up_proj"),
    (
        ONE,
        "LongcatFlashExperts.down_proj Step3p7Experts.down_proj ZambaMambaMixer.dt_proj_weight",
    ),
    (
        _one(_HEADS_IN_THE_LAST_AXES),
        """XLNetRelativeAttention.q XLNetRelativeAttention.k XLNetRelativeAttention.v
        XLNetRelativeAttention.r FunnelRelMultiheadAttention.r_kernel""",
    ),
    (_one(MatrixSpec(flattened=True)), "XLNetRelativeAttention.o"),
    (_sized("dt, B, C", _selective), "ZambaMambaMixer.x_proj_weight"),
    (
        _sized("weights before, weights after, mixing weights", _hyper_connection),
        "DeepseekV4HyperConnection.fn Glm5NextTextHyperConnection.fn",
    ),
    (
        _equal("weights before, weights after"),
        "HYV4HyperConnection.fn HYV4VLHyperConnection.fn",
    ),
]


def _table(rows: list[tuple[Known, str]]) -> dict[tuple[str, str], Known]:
    entries = {}
    for known, names in rows:
        for name in names.split():
            cls, _, place = name.partition(".")
            entries[cls, place] = known
    return entries


FUSED = _table(_PROJECTIONS)
"""By the class around a projection and what the projection is called there, with a dot between the
names where another module stands between the two, and a star for any number."""

BARE_MATRICES = _table(_BARE)
"""By the class that holds a parameter and what the parameter is called there."""
