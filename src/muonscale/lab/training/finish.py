"""The end of a run: held-out loss beside n-gram baselines, a sample, the model, the result."""

from __future__ import annotations

import math
import statistics
from typing import Any

from transformers import PreTrainedModel

from muonscale.lab.data.ngram import fit_ngrams
from muonscale.lab.files import write_atomic, write_json
from muonscale.lab.models.card import model_card
from muonscale.lab.models.convert import save_hf
from muonscale.lab.models.generate import generate_text
from muonscale.lab.models.structure import count_parameters
from muonscale.lab.parallel.gather import whole_model
from muonscale.lab.report.loss_figure import write_loss_figure
from muonscale.lab.training.setup import Run
from muonscale.lab.training.signals import StopRequest
from muonscale.lab.training.validation import held_out_record

NGRAM_TOKENS = 50_000_000
"""Training tokens the n-gram baselines are fitted on at most."""

TIMES = ("step_ms", "optimizer_ms", "tokens_per_second")
"""What a record of a step says of its time."""

NOT_RECORDED = ("train_seconds", "tokens_per_second", "optimizer_share", "skipped_steps", "spikes")
"""Keys of the result that are None where no record of a step is left."""

TEMPERATURE, TOP_K = 0.8, 50
"""How the sample is drawn."""


def finish(run: Run, stop: StopRequest) -> dict[str, Any]:
    """Evaluate on the whole held-out split and write what a finished run leaves, result.json last.

    A collective of all ranks; the first one writes.

    Raises:
        Interrupted: if asked to stop; the run stays unfinished and can be resumed.
    """
    run.console.say("evaluating on the whole held-out split")
    record = held_out_record(run, stop)
    stop.raise_if_asked("stopped in the final evaluation; all steps are saved: use --resume")
    assert record is not None
    model = whole_model(run.state.model, run.processes)
    result = run.processes.on_first(lambda: _write(run, model, record))
    stop.raise_if_asked("stopped before result.json was written; finish with --resume")
    run.processes.on_first(lambda: _conclude(run, result))
    _say(run, result)
    return result


def _conclude(run: Run, result: dict[str, Any]) -> None:
    """Write result.json, tell the trackers, and add what became of them.

    In this order: a tracker that waits for a network must not keep a run unfinished.
    """
    path = run.folder.path / "result.json"
    write_json(path, result)
    if trackers := run.trackers.end(result, run.state.step):
        result["trackers"] = trackers
        write_json(path, result)


def _write(run: Run, model: PreTrainedModel | None, record: dict[str, Any]) -> dict[str, Any]:
    """Write all files but result.json, and return what belongs into it."""
    assert model is not None
    run.folder.replace_metrics(record)
    run.trackers.log(record)
    result = {key: value for key, value in record.items() if key != "kind"}
    result |= _baselines(run) | _speed(run)
    result["perplexity"] = math.exp(record["held_out_loss"])
    result["parameters"] = count_parameters(model).total
    result["sample"] = _sample(run, model)
    write_atomic(run.folder.path / "sample.txt", result["sample"] + "\n")
    save_hf(model, run.tokenizer, run.folder.model, card=_card(run, model))
    write_loss_figure(run.folder.path, result)
    return result


def _card(run: Run, model: PreTrainedModel) -> str:
    folder = run.folder
    config, env, metrics = folder.saved_config(), folder.environment(), folder.read_metrics()
    return model_card(config, env, metrics, step=run.state.step, model=model)


def _baselines(run: Run) -> dict[str, Any]:
    """Fit unigram and bigram on what the run read; evaluate them where the model was evaluated."""
    at_most = NGRAM_TOKENS // run.config.data.sequence_length
    batches = run.batches
    ngrams = fit_ngrams(batches.seen(at_most=at_most), len(run.tokenizer))
    fits = {"unigram_loss": ngrams.unigram_loss, "bigram_loss": ngrams.bigram_loss}
    return {
        key: batches.mean({name: loss(batches.evaluation(name)) for name in run.corpora})
        for key, loss in fits.items()
    }


def _speed(run: Run) -> dict[str, Any]:
    records = [r for r in run.folder.read_metrics() if r["kind"] == "train"]
    steps = [r for r in records if all(isinstance(r.get(key), int | float) for key in TIMES)]
    if not steps:  # resumed after its last step, and its records were lost
        return dict.fromkeys(NOT_RECORDED)
    usual = [r for r in steps if "profiled" not in r] or steps
    heard = attention_times(usual)
    return {
        "train_seconds": sum(r["step_ms"] for r in steps) / 1000,
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in usual),
        "optimizer_share": sum(r["optimizer_ms"] for r in usual) / sum(r["step_ms"] for r in usual),
        "skipped_steps": steps[-1].get("skipped_steps"),
        "spikes": steps[-1].get("spikes"),  # of a run begun before they were counted: None
        **({"attention": heard} if heard else {}),
    }


def attention_times(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what it took to hear attention in a run; nothing where it was not heard.

    Args:
        records: of training, in order.

    Returns:
        heard_steps, and seconds of them spent on logits; median step_ms of these steps, and of the
        others as other_step_ms (None without any).
    """
    heard = [r for r in records if "attention_ms" in r]
    others = [r["step_ms"] for r in records if "attention_ms" not in r]
    if not heard:
        return {}
    return {
        "heard_steps": len(heard),
        "seconds": sum(r["attention_ms"] for r in heard) / 1000,
        "step_ms": statistics.median(r["step_ms"] for r in heard),
        "other_step_ms": statistics.median(others) if others else None,
    }


def _attention_line(heard: dict[str, Any]) -> str:
    other = heard["other_step_ms"]
    beside = "" if other is None else f", {other:.0f} ms others"
    return (
        f"attention heard in {heard['heard_steps']} steps, {heard['seconds']:.1f} s; "
        f"these took {heard['step_ms']:.0f} ms{beside} (median)"
    )


def _speed_line(result: dict[str, Any]) -> str:
    if result["train_seconds"] is None:
        return "metrics.jsonl has no record of a step: the times are lost"
    return (
        f"trained in {result['train_seconds']:.0f} s, {result['tokens_per_second']:,.0f} tokens/s, "
        f"optimizer {100 * result['optimizer_share']:.1f} % of the step"
    )


def _sample(run: Run, model: PreTrainedModel) -> str:
    tokens = run.config.eval.sample_tokens
    if tokens == 0:
        return ""
    return generate_text(
        model,
        run.tokenizer,
        run.config.eval.prompt,
        tokens=tokens,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        seed=run.config.run.seed,
    )


def _say(run: Run, result: dict[str, Any]) -> None:
    below = result["bigram_loss"] - result["held_out_loss"]
    if result["sample"]:
        run.console.say(f"--- sample\n{result['sample']}\n---")
    if "attention" in result:
        run.console.say(_attention_line(result["attention"]))
    bits = f"; {result['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in result else ""
    run.console.say(
        f"held out, nats per token: unigram {result['unigram_loss']:.3f}, bigram "
        f"{result['bigram_loss']:.3f}, model {result['held_out_loss']:.3f} "
        f"({abs(below):.3f} {'below' if below > 0 else 'above'} the bigram){bits}\n"
        f"{_speed_line(result)}\n"
        f"model in {run.folder.model}, curve in {run.folder.path / 'loss.png'}; try: "
        f'muonscale generate {run.folder.path} "def "'
    )
