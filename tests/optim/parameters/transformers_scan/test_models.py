"""Every model class that builds on meta gets parameter groups, and the right ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from muonscale.optim.matrices.spec import PLAIN, MatrixSpec
from muonscale.optim.parameters.roles import Role
from tests.optim.parameters.transformers_scan.excused import (
    EXCUSED_HEADS,
    EXCUSED_USES,
    excuse,
)
from tests.optim.parameters.transformers_scan.findings import Use
from tests.optim.parameters.transformers_scan.models import Sweep, sweep
from tests.optim.parameters.transformers_scan.static import findings
from tests.optim.parameters.transformers_scan.uses import Bare, fault

BARE = Bare(
    cls="Layer",
    attribute="w",
    shape=(4, 8),
    role=Role.HIDDEN,
    rule="muon",
    matrices=PLAIN,
    guessed=False,
    model="Model",
    name="layer.w",
)


def use(kind: str, how: str = "") -> Use:
    return Use("Layer", "w", kind, how, 1, "new/modeling_new.py")


class TestFault:
    @pytest.mark.parametrize("kind", ["elementwise", "lookup", "table", "kernel"])
    def test_what_is_no_matrix_on_muon(self, kind: str) -> None:
        assert "on Muon" in fault(BARE, [use(kind)])
        assert fault(replace(BARE, rule="adamw"), [use(kind)]) == ""

    def test_a_matrix_that_is_not_on_muon_unless_it_is_said(self) -> None:
        on_adamw = replace(BARE, rule="adamw", role=Role.NORM)
        assert "not on Muon" in fault(on_adamw, [use("linear")])
        assert fault(replace(on_adamw, guessed=True), [use("linear")]) == ""

    def test_a_matrix_stored_the_other_way_round(self) -> None:
        transposed = replace(BARE, matrices=MatrixSpec(transposed=True))
        assert fault(BARE, [use("linear")]) == fault(transposed, [use("matrix_right")]) == ""
        assert "sums over [4]" in fault(BARE, [use("matrix_right")])
        assert "sums over [8]" in fault(transposed, [use("linear")])
        assert "sums over [4]" in fault(BARE, [use("linear", "[swapped] F.linear(x, self.w.T)")])

    def test_a_kernel_of_three_axes_in_a_sum(self) -> None:
        heads = replace(BARE, shape=(16, 4, 8))
        sums = [use("einsum", "hnd, sums over h: einsum('ibh,hnd->ibnd')")]
        assert "sums over [16]" in fault(heads, sums)
        flat = replace(heads, matrices=MatrixSpec(flattened=True, transposed=True))
        assert fault(flat, sums) == ""

    def test_rows_taken_by_index_are_a_table(self) -> None:
        by_index = use("elementwise", "[looked up] x + self.w[i]")
        assert "table" in fault(BARE, [by_index])


@pytest.fixture(scope="module")
def found() -> Sweep:
    found = sweep()
    print(f"\n{found.table()}")
    return found


@pytest.mark.slow
class TestModels:
    def test_no_class_crashes(self, found: Sweep) -> None:
        assert found.built > 600
        assert found.crashed == {}

    def test_no_output_layer_is_on_muon(self, found: Sweep) -> None:
        assert found.heads > 600
        assert [
            head for head in found.heads_on_muon if not excuse(head.split()[0], EXCUSED_HEADS)
        ] == []

    def test_every_bare_parameter_is_what_the_code_uses_it_as(self, found: Sweep) -> None:
        uses = findings().use_keys()
        wrong = []
        for bare in found.bare.values():
            what = fault(bare, uses.get(bare.key, []))
            if what and not excuse(".".join(bare.key), EXCUSED_USES):
                wrong.append(_describe(bare, what, uses.get(bare.key, [])))
        assert len(found.bare) > 300
        assert not wrong, "\n".join(wrong)


def _describe(bare: Bare, what: str, uses: list[Use]) -> str:
    seen = "; ".join(f"{u.how} at {u.file}:{u.line}" for u in uses[:3])
    return f"{bare.cls}.{bare.attribute} {bare.shape} of {bare.model} ({bare.role}): {what}; {seen}"
