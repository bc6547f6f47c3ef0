"""Every cut of a linear layer's output in transformers is in the table, or has an excuse."""

from __future__ import annotations

import transformers

from tests.optim.parameters.transformers_scan.excused import EXCUSED_CUTS, LATENT
from tests.optim.parameters.transformers_scan.static import TABLE, cut_verdict, findings


def test_every_cut_is_known_or_excused() -> None:
    verdict = cut_verdict()
    print(f"\ntransformers {transformers.__version__}\n{verdict.table(findings())}")
    assert verdict.known and verdict.excused
    assert not verdict.unknown, (
        "The output of these layers is cut, and the table of fused weights does not have them. "
        "Add them to muonscale.optim.parameters.fused_table, or a reason to excused.py:\n"
        + verdict.report()
    )


def test_every_excuse_is_needed() -> None:
    assert cut_verdict().unused == []


def test_an_entry_that_the_table_lacks_is_reported() -> None:
    fused = ("Phi3MLP", "gate_up_proj")
    assert set(cut_verdict(table=TABLE - {fused}).unknown) - set(cut_verdict().unknown) == {fused}


def test_an_excuse_that_is_missing_is_reported() -> None:
    excuses = {why: globs for why, globs in EXCUSED_CUTS.items() if why != LATENT}
    unknown = set(cut_verdict(excuses=excuses).unknown) - set(cut_verdict().unknown)
    assert ("DeepseekV3Attention", "kv_a_proj_with_mqa") in unknown
    assert all(attribute.startswith(("kv_", "q_")) for _, attribute in unknown)


def test_a_class_that_is_not_in_transformers_yet_is_reported() -> None:
    classes = {cls for cls, _ in cut_verdict(table=set()).unknown}
    assert {"Phi3MLP", "MptAttention", "BloomAttention", "Qwen3NextGatedDeltaNet"} <= classes
