from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from muonscale.errors import ConfigError
from muonscale.lab.estimate.estimate import estimate
from muonscale.lab.estimate.flops import newton_schulz_flops
from muonscale.lab.estimate.resolve import PlanRequest, resolve
from muonscale.lab.estimate.text import plan_text
from muonscale.lab.files import to_json
from muonscale.lab.targets import inspect
from tests.lab.estimate.build import MOONLIGHT, SMALL, planned


def facts(*overrides: str, target: str = "llama-pico", **asked: Any) -> dict[str, Any]:
    words = [*SMALL, *overrides]
    return estimate(PlanRequest(target=target, overrides=words, **asked))


def test_newton_schulz_costs_what_its_products_do() -> None:
    # five steps of X @ X.T, one square product and one with X, whole on a GPU: 4 S^2 L + 2 S^3
    seen = planned("fsdp=4", "optimizer.ns_form=direct")
    expected = 0
    for row in inspect("llama-pico").groups.rows:
        if row.rule == "muon":
            for count, out, in_ in row.holds:
                short, long = sorted((out, in_))
                expected += count * 5 * (4 * short**2 * long + 2 * short**3)
    assert sum(newton_schulz_flops(seen.placement)) == expected


def test_ranks_of_a_tensor_parallel_group_share_what_is_whole_on_both() -> None:
    seen = planned("fsdp=2,tp=2", "optimizer.ns_form=direct", target="llama-nano")
    assert sum(newton_schulz_flops(seen.placement)) == sum(
        newton_schulz_flops(
            planned("fsdp=4", "optimizer.ns_form=direct", target="llama-nano").placement
        )
    )


def test_tensor_parallel_passes_add_up_to_the_model() -> None:
    alone, shared = facts(layout="fsdp=1"), facts(layout="tp=2")
    norms = 6 * 5 * 32 * 768  # on both
    assert alone["flops"]["devices_per_step"] == alone["flops"]["model_per_step"]
    assert shared["flops"]["devices_per_step"] == alone["flops"]["devices_per_step"] + norms


def test_adamw_alone_has_no_parts_of_muon() -> None:
    found = facts("optimizer.rule=adamw", layout="ddp=2")
    assert found["memory"]["parts"]["matrix_state"] == 0
    assert found["flops"]["newton_schulz_per_step"] == 0
    assert found["time"]["slower_than_adamw"] == 0
    assert not [row for row in found["traffic"]["messages"] if row["purpose"] == "matrices"]
    text = plan_text(found)
    assert "every parameter is on AdamW" in text and "Muon pays" not in text


def test_muon_is_slower_and_the_break_even_follows() -> None:
    time = facts(layout="fsdp=2")["time"]
    assert time["step"] > time["adamw_step"] > 0
    assert time["break_even_fewer_steps"] == pytest.approx(1 - time["adamw_step"] / time["step"])
    assert time["tokens_per_second"] == pytest.approx(768 / time["step"])
    assert time["hours"] == pytest.approx(3 * time["step"] / 3600)


def test_what_does_not_fit_is_said_plainly() -> None:
    found = facts("data.sequence_length=4096", "train.batch_tokens=40960000",
                  "eval.batch_tokens=4096", layout="fsdp=1")  # fmt: skip
    memory = found["memory"]
    assert memory["peak"] > memory["device"] == 80 * 10**9 and not memory["fits"]
    assert "of 74.51 GiB; activations need most: --micro-batch 4096" in plan_text(found)
    less = facts("data.sequence_length=4096", "train.batch_tokens=40960000",
                 "eval.batch_tokens=4096", layout="fsdp=1", micro_batch=4096)  # fmt: skip
    assert less["memory"]["fits"] and less["memory"]["advice"] is None


def test_devices_are_arranged_as_the_configuration_says() -> None:
    words = ["parallel.data=hsdp", "train.batch_tokens=512"]
    found = facts(*words, devices=16)
    assert found["layout"]["layout"] == "hsdp=2x8"  # a replica for each machine of eight
    assert facts(devices=3)["layout"]["layout"] == "fsdp=3"
    assert facts()["layout"]["devices"] == 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"devices": 4, "layout": "fsdp=2"}, "--layout fsdp=2 has 2 devices, and --devices is 4"),
        ({"devices": 5000}, "accepted: 1 to 4096"),
        ({"devices": 0}, "accepted: 1 to 4096"),
        ({"layout": "fsdp=8192"}, "accepted: 1 to 4096"),
        ({"devices": 5}, "5 data-parallel ranks cannot share evenly"),
        ({"micro_batch": 512}, "train.micro_batch_tokens=512 does not divide"),
        ({"micro_batch": 33}, "multiple of"),
        ({"mfu": 1.5}, "--mfu 1.5"),
        ({"bandwidth": -1e9}, "--bandwidth -1"),
        ({"device": "h300"}, "h100"),
        ({"layout": "tp=8"}, "num_attention_heads"),
    ],
)
def test_what_cannot_be_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        facts(**asked)
    assert said in str(caught.value)


def test_a_model_without_a_recipe_gets_a_sequence_for_every_rank() -> None:
    found = estimate(PlanRequest(target=str(MOONLIGHT), devices=64))
    assert found["layout"]["sequence_length"] == 8192
    assert found["layout"]["batch_tokens"] == 64 * 8192
    assert found["time"]["hours"] is None
    said = [row for row in found["assumptions"] if row["what"] == "not given"]
    assert len(said) == 2
    given = resolve(PlanRequest(target=str(MOONLIGHT), overrides=["data.sequence_length=1000"]))
    assert given.workload.batch_tokens == 1000 and len(given.defaults) == 1


def test_a_preset_is_planned_like_its_published_configuration() -> None:
    seen = [
        resolve(PlanRequest(target=target, devices=64))
        for target in ("moonlight-16b-a3b", str(MOONLIGHT))
    ]
    assert seen[0].shape.max_position_embeddings == seen[1].shape.max_position_embeddings == 8192
    assert seen[0].workload == seen[1].workload and seen[0].defaults == seen[1].defaults
    sizes = [{name: p.shape for name, p in one.model.named_parameters()} for one in seen]
    assert sizes[0] == sizes[1]


def test_a_name_of_a_preset_and_a_recipe_is_planned_as_the_recipe() -> None:
    seen = resolve(PlanRequest(target="moonlight-nano", device="cpu"))
    assert seen.timed and not seen.defaults
    assert seen.config.train.batch_tokens == 4096 and seen.config.steps == 269
    shape = resolve(PlanRequest(target="llama-nano", device="cpu"))
    assert not shape.timed and shape.config.train.batch_tokens == 256


def test_moonlight_on_64_devices_is_what_its_shapes_say() -> None:
    found = estimate(PlanRequest(target=str(MOONLIGHT), devices=64))
    parts = found["memory"]["parts"]
    # all first axes but that of the 576 rows of kv_a (padded nowhere: 64 x 9) divide by 64
    assert parts["parameters"] == parts["gradients"] == 4 * found["model"]["parameters"] // 64
    outside, stack = 2 * 163840 * 2048 + 2048, 64 * 3 * 2048 * 1408
    attention = 2048 * (3072 + 576 + 2048) + 512 * 4096 + 512
    layer = stack + attention + 64 * 2048 + 3 * 2048 * 2816 + 2 * 2048
    assert parts["gathered"] == 2 * (outside + 2 * layer)
    assert found["balance"]["matrices"] == 5207


def test_json_holds_integers_for_bytes_and_every_key_of_the_table() -> None:
    found = estimate(PlanRequest(target="llama-pico", overrides=SMALL, layout="fsdp=2"))
    tree = json.loads(to_json(found))
    assert list(tree) == [
        "model", "layout", "flops", "memory", "traffic", "balance", "time", "papers", "assumptions",
    ]  # fmt: skip
    assert all(type(value) is int for value in tree["memory"]["parts"].values())
    assert all(type(row["mean"]) is int for row in tree["traffic"]["messages"])
    assert all(row["what"] and row["source"] for row in tree["assumptions"])


def test_the_table_is_aligned_and_plain() -> None:
    text = plan_text(facts(layout="fsdp=2"))
    assert text.isascii()
    memory = text.split("memory per device\n")[1].split("\n\n")[0].splitlines()
    assert len({line.index("iB") for line in memory if "iB" in line}) == 1


def test_the_picture_has_every_part(tmp_path: Path) -> None:
    from muonscale.lab.estimate.figure import write_figure

    found = facts(layout="fsdp=2")
    write_figure(found, tmp_path / "plan.svg")
    drawn = (tmp_path / "plan.svg").read_text()
    for name in ("step workspace", "Newton-Schulz: ", "logits", "memory of the device: "):
        assert f"<!-- {name}" in drawn
    write_figure(found, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
