"""Models that run on meta, as a check of the scan that reads code."""

from __future__ import annotations

import functools
import warnings
from collections import Counter

import pytest
import transformers

from tests.optim.parameters.transformers_scan.build import build, model_classes
from tests.optim.parameters.transformers_scan.static import cut_verdict
from tests.optim.parameters.transformers_scan.views import Piece, Run, run

pytestmark = pytest.mark.slow
MAPPINGS = ["CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION"]


@functools.cache
def runs() -> dict[str, Run]:
    """Run every class that builds, on meta."""
    transformers.logging.set_verbosity_error()
    found = {}
    for model_type, name in model_classes(MAPPINGS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = build(model_type, name, _attn_implementation="eager")
            except Exception:  # no default configuration makes a model
                continue
            found[name] = run(model)
    return found


def pieces() -> dict[tuple[str, str], set[Piece]]:
    """Return what was viewed of each layer, over all models."""
    found: dict[tuple[str, str], set[Piece]] = {}
    for result in runs().values():
        for key, views in result.pieces.items():
            found.setdefault(key, set()).update(views)
    return found


def test_most_language_models_run() -> None:
    ran = [result for result in runs().values() if not result.error]
    errors = Counter(result.error.split(":")[0] for result in runs().values() if result.error)
    layers = sum(result.layers for result in runs().values())
    print(f"\n{len(ran)} of {len(runs())} models ran to the end, {layers} linear layers; {errors}")
    assert len(ran) > 0.7 * len(runs())


def test_what_is_viewed_apart_is_a_cut_of_the_scan() -> None:
    verdict = cut_verdict()
    seen = verdict.known | verdict.excused.keys()
    new = {key: views for key, views in pieces().items() if key not in seen}
    print(f"\n{len(pieces())} layers with pieces of features, {len(new)} new to the scan of code")
    assert not new, "\n".join(
        f"{'.'.join(key)}: {', '.join(map(str, list(views)[:4]))}" for key, views in new.items()
    )


def test_thirds_are_seen() -> None:
    assert any(p.features * 3 == p.of and p.runs == 1 for p in pieces()["MptAttention", "Wqkv"])
