"""Cuts that are no reason to divide a matrix, and uses of parameters that the scan misreads.

Every name is a glob over "Class.attribute", so that a new model that copies an old one is excused
as that one is. A glob that matches nothing any more fails the test.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

OUTPUT = "output layer, on AdamW: its columns are scores, boxes or points"
LATENT = "latent attention: each projection is one matrix, as Moonlight trains it"
POSITIONS = "positions turn or scale a part of each head, or of an embedding"
ROUTER = "router: its rows are experts, one matrix"
HEADS = "heads are one matrix by design"
OTHER_AXIS = "cut along tokens, which the scan takes for features"
TABLE = "table of relative positions or segments, on AdamW"

EITHER_SIDE = "one projection (d to heads), applied to positions or, transposed, to queries"

EXCUSED_CUTS: dict[str, str] = {
    OUTPUT: """
        *ForQuestionAnswering.qa_outputs *ForQuestionAnsweringSimple.qa_outputs
        BigBirdForQuestionAnswering.qa_classifier.qa_outputs
        LayoutLMv3ForQuestionAnswering.qa_outputs.out_proj ModernBertForQuestionAnswering.classifier
        DPRSpanPredictor.qa_outputs
        *ForObjectDetection.bbox_embed.layers *ForObjectDetection.bbox_predictor.layers
        ConditionalDetrDecoder.ref_point_head.layers DabDetrDecoder.ref_anchor_head.layers
        Owlv2ForObjectDetection.objectness_head.dense2
        *MaskDecoder.iou_prediction_head.proj_out
        GradiumPhononTTSForConditionalGeneration.eos_head PocketTTSForConditionalGeneration.eos_head
        HiggsAudioV2ForConditionalGeneration.audio_lm_head Inkling*.lm_head
        PatchTSMixerForPredictionHead.base_forecast_block
        TimesFmModelForPrediction.horizon_ff_layer.output_layer
        TimesFmModelForPrediction.horizon_ff_layer.residual_layer
    """,
    LATENT: """
        *.kv_a_proj_with_mqa *.kv_b_proj *.q_b_proj
        BailingHybridAttention.q_proj DeepseekV[23]Attention.q_proj Glm4MoeLiteAttention.q_proj
        MiniCPM3Attention.q_proj Mistral4Attention.q_proj MistralLarge4TextAttention.q_proj
        YoutuAttention.q_proj
    """,
    POSITIONS: """
        *Indexer.wk *Indexer.wq_b
        ClvpSelfAttention.[qkv]_proj GPTJAttention.[qk]_proj PhiAttention.[qk]_proj
        StableLmAttention.[qk]_proj DiTAttention.to_[qk]
        RoFormerSelfAttention.query RoFormerSelfAttention.key RoFormerSelfAttention.value
        VJEPA2RopeAttention.query VJEPA2RopeAttention.key
        DabDetrDecoder.query_scale.layers
    """,
    ROUTER: "InklingTopkRouter.weight LagunaTopKRouter.weight",
    HEADS: "LSHSelfAttention.query_key LSHSelfAttention.value DiffLlamaAttention.v_proj",
    OTHER_AXIS: """
        EdgeTamVideoModel.mask_decoder.transformer.* Sam2VideoModel.mask_decoder.transformer.*
        Sam3TrackerVideoModel.mask_decoder.transformer.*
        LightGlueForKeypointMatching.transformer_layers.*
        LocalSelfAttention.key LocalSelfAttention.value
        ProphetNetNgramSelfAttention.*_proj
    """,
    TABLE: "FunnelRelMultiheadAttention.seg_embed VitsAttention.emb_rel_k",
}
"""By reason: globs over "Class.attribute" of what is cut."""

EXCUSED_USES: dict[str, str] = {
    TABLE: """
        XLNetRelativeAttention.seg_embed FunnelRelMultiheadAttention.seg_embed
        VitsAttention.emb_rel_[kv]
    """,
    EITHER_SIDE: "FunnelRelMultiheadAttention.r_kernel",
}
"""By reason: globs over "Class.attribute" of bare parameters."""

PROPOSALS = "scores of the encoder's proposals: the model itself reads them to choose queries"

EXCUSED_HEADS: dict[str, str] = {PROPOSALS: "DFineModel Deimv2Model RTDetrModel RTDetrV2Model"}
"""By reason: globs over classes of models with a Linear that is called a head, on Muon."""


def excuse(name: str, excuses: Mapping[str, str]) -> str:
    """Return the reason that excuses `name`, "" for none."""
    found = (why for why, globs in excuses.items() if matching(name, globs))
    return next(found, "")


def matching(name: str, globs: str) -> list[str]:
    """Return the globs that match `name`."""
    return [glob for glob in globs.split() if fnmatch.fnmatchcase(name, glob)]
