"""The end of a run: validation loss, n-gram baselines, a sample, the model, and result.json."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from muonscale.errors import command_line
from muonscale.lab.files import write_atomic, write_json
from muonscale.lab.models.adapter import is_adapted, merge_adapter, save_adapter
from muonscale.lab.models.card import model_card
from muonscale.lab.models.convert import save_hf
from muonscale.lab.models.generate import generate_text
from muonscale.lab.models.structure import count_parameters
from muonscale.lab.parallel.gather import gather_model
from muonscale.lab.report.loss_figure import write_loss_figure
from muonscale.lab.training.baselines import ngram_baselines
from muonscale.lab.training.checkpoint import resume_advice
from muonscale.lab.training.setup import Run
from muonscale.lab.training.signals import StopRequest
from muonscale.lab.training.validation import measure_validation

TIMES = ("step_ms", "optimizer_ms", "tokens_per_second")
"""Times in the record of a step."""

NOT_RECORDED = (
    *("train_seconds", "tokens_per_second", "mean_tokens_per_second", "optimizer_share"),
    *("skipped_steps", "spikes"),
)
"""Keys of the result that are None if no record of a step is left."""

TEMPERATURE, TOP_K = 0.8, 50
"""Sampling options of the sample."""


def finish(run: Run, stop: StopRequest, record: dict[str, Any] | None = None) -> dict[str, Any]:
    """Evaluate on the whole validation split and write the final files, result.json last.

    A collective of all ranks; the first one writes.

    Args:
        run: the run.
        stop: checked before every batch.
        record: the evaluation, if it is done.

    Raises:
        Interrupted: if a stop was requested; the run stays unfinished and can be resumed.
    """
    if record is None:
        with run.console.stages("") as report:
            record = measure_validation(run, stop, report=partial(report, "final evaluation"))
    stop.raise_if_requested("stopped in the final evaluation; all steps are saved: use --resume")
    assert record is not None
    baselines = run.processes.on_first(lambda: ngram_baselines(run, stop))
    model = gather_model(run.state.model, run.processes)
    result = run.processes.on_first(
        lambda: _write_files(run, _merged(run, model), record, baselines)
    )
    _export_average(run)
    stop.raise_if_requested("stopped before result.json was written; finish with --resume")
    run.processes.on_first(lambda: _write_result(run, result))
    _log_result(run, result)
    return result


def _merged(run: Run, model: PreTrainedModel | None) -> PreTrainedModel:
    """Return the plain model to write, on the first rank; write its adapter if it has one."""
    assert model is not None
    if is_adapted(model):
        save_adapter(model, run.folder.adapter)
    return merge_adapter(model)


def _export_average(run: Run) -> None:
    """Write the average of the weights as a Hugging Face folder, if there is one: a collective."""
    average, folder = run.state.average, run.folder
    if average is None or not average.count:
        return

    with average.in_place():
        model = gather_model(run.state.model, run.processes)
        run.processes.on_first(
            lambda: _save_model(
                run, model and merge_adapter(model), folder.read_metrics(), averaged=True
            )
        )


def _save_model(
    run: Run, model: PreTrainedModel | None, metrics: list[dict[str, Any]], *, averaged: bool
) -> None:
    """Write a model with its card as a Hugging Face folder: the weights, or their average."""
    assert model is not None
    folder = run.folder
    saved, env, step = folder.saved_config(), folder.environment(), run.state.step
    card = model_card(saved, env, metrics, step=step, model=model, averaged=averaged)
    advice = f"remove the cause, and {resume_advice(folder.checkpoints)}"
    target = folder.averaged_model if averaged else folder.model
    save_hf(model, run.tokenizer, target, card=card, advice=advice)


def _write_files(
    run: Run, model: PreTrainedModel, record: dict[str, Any], baselines: dict[str, float]
) -> dict[str, Any]:
    """Write all files but result.json, and return its content."""
    folder, config = run.folder, run.config
    metrics = folder.replace_metrics(record)
    run.trackers.log(record)
    result = {key: value for key, value in record.items() if key != "kind"}
    result |= baselines
    for start in (r for r in metrics if r["kind"] == "eval" and r["step"] == 0):
        result["start_validation_loss"] = start["validation_loss"]
    if (target := config.train.target_loss) is not None:
        result |= {"target_loss": target, "target_reached": record["validation_loss"] <= target}
    result |= _step_times(metrics)
    result["perplexity"] = math.exp(record["validation_loss"])
    result["parameters"] = count_parameters(model).total
    result["sample"] = sample_text(run, model) if config.eval.sample_tokens > 0 else ""
    write_atomic(folder.path / "sample.txt", result["sample"] + "\n")
    _save_model(run, model, metrics, averaged=False)
    write_loss_figure(folder.path, result)
    return result


def sample_text(run: Run, model: PreTrainedModel) -> str:
    """Return text that a run's model writes after `eval.prompt`."""
    return generate_text(
        model,
        run.tokenizer,
        run.config.eval.prompt,
        tokens=run.config.eval.sample_tokens,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        seed=run.config.run.seed,
    )


def _write_result(run: Run, result: dict[str, Any]) -> None:
    """Write result.json, end the trackers, and add their final state.

    In this order: a tracker that waits for a network must not keep a run unfinished.
    """
    path = run.folder.path / "result.json"
    write_json(path, result)
    if trackers := run.trackers.end(result, run.state.step):
        result["trackers"] = trackers
        write_json(path, result)


def _step_times(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    records = [r for r in metrics if r["kind"] == "train"]
    steps = [r for r in records if all(isinstance(r.get(key), int | float) for key in TIMES)]
    if not steps:  # resumed after its last step, and its records were lost
        return dict.fromkeys(NOT_RECORDED)
    usual = [r for r in steps if "profiled" not in r] or steps
    attention = attention_times(usual)
    milliseconds = sum(r["step_ms"] for r in steps)
    return {
        "train_seconds": milliseconds / 1000,
        "mean_tokens_per_second": sum(r["tokens_per_second"] * r["step_ms"] for r in steps)
        / milliseconds,
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in usual),
        "optimizer_share": sum(r["optimizer_ms"] for r in usual) / sum(r["step_ms"] for r in usual),
        "skipped_steps": steps[-1].get("skipped_steps"),
        "spikes": steps[-1].get("spikes"),
        **({"attention": attention} if attention else {}),
    }


def attention_times(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the time that recording attention logits took; empty if none were recorded.

    Args:
        records: training records, in order.

    Returns:
        recorded_steps, and seconds of them spent on logits; median step_ms of these steps, and of
        the others as other_step_ms (None without any).
    """
    recorded = [r for r in records if "attention_ms" in r]
    others = [r["step_ms"] for r in records if "attention_ms" not in r]
    if not recorded:
        return {}
    return {
        "recorded_steps": len(recorded),
        "seconds": sum(r["attention_ms"] for r in recorded) / 1000,
        "step_ms": statistics.median(r["step_ms"] for r in recorded),
        "other_step_ms": statistics.median(others) if others else None,
    }


def _log_result(run: Run, result: dict[str, Any]) -> None:
    if result["sample"]:
        run.console.log(f"--- sample\n{result['sample']}\n---")
    if (times := result.get("attention")) is not None:
        other = times["other_step_ms"]
        others = "" if other is None else f", other steps {other:.0f} ms"
        run.console.log(
            f"attention logits recorded in {times['recorded_steps']} steps, {times['seconds']:.1f} "
            f"s; median time of these steps {times['step_ms']:.0f} ms{others}"
        )
    below = result["bigram_loss"] - result["validation_loss"]
    bits = f"; {result['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in result else ""
    if (error := result.get("validation_loss_se")) is not None:
        bits = f", standard error of the split {error:.4f}{bits}"
    speed = "metrics.jsonl has no record of a step: the times are lost"
    if result["train_seconds"] is not None:
        speed = (
            f"trained in {result['train_seconds']:.0f} s, "
            f"{result['mean_tokens_per_second']:,.0f} tokens/s (median of the steps "
            f"{result['tokens_per_second']:,.0f}), optimizer "
            f"{100 * result['optimizer_share']:.1f} % of the step"
        )
    prompt = [run.config.eval.prompt] if run.config.eval.prompt else []
    started = ""
    if (before := result.get("start_validation_loss")) is not None:
        started = (
            f"validation loss before training {before:.3f}, after {result['validation_loss']:.3f} "
            f"({_change(before, result['validation_loss'])})\n"
        )
    averaged = ""
    if (loss := result.get("average_validation_loss")) is not None:
        averaged = (
            f"validation loss of the average of the weights {loss:.3f} "
            f"({_change(result['validation_loss'], loss)}), in {run.folder.averaged_model}\n"
        )
    target = ""
    if (wanted := result.get("target_loss")) is not None:
        seconds = result["train_seconds"]
        target = (
            f"validation loss {wanted:g} {'' if result['target_reached'] else 'not '}reached in "
            f"{result['step']:,} steps, {result['tokens']:,} tokens"
            f"{'' if seconds is None else f', {seconds:.1f} s of training'}\n"
        )
    run.console.log(
        f"{target}{started}{averaged}validation loss in nats per token: unigram "
        f"{result['unigram_loss']:.3f}, bigram {result['bigram_loss']:.3f}, model {result['validation_loss']:.3f} "
        f"({abs(below):.3f} {'below' if below > 0 else 'above'} the bigram){bits}\n"
        f"{speed}\n"
        f"model in {run.folder.model}, curve in {run.folder.path / 'loss.png'}; try: "
        f"{command_line('generate', run.folder.path, *prompt)}"
    )


def _change(before: float, after: float) -> str:
    """Return the change of a loss as text, such as `0.120 better`."""
    return f"{abs(after - before):.3f} {'better' if after < before else 'worse'}"
