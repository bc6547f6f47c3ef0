"""`muonscale plan` against a training step: bytes by collective, and memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_counter import Counter
from distributed_memory import held_bytes
from distributed_world import run_on

from muonscale.lab.bench.measure import peak_extra_bytes
from muonscale.lab.config.load import load_config
from muonscale.lab.estimate.activations import activation_bytes
from muonscale.lab.estimate.memory import RankMemory, rank_memory
from muonscale.lab.estimate.resolve import PlanRequest, ResolvedPlan, resolve
from muonscale.lab.estimate.traffic import (
    Message,
    activation_flow,
    count_exchanges,
    optimizer_messages,
    shared_messages,
)
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.topology import Topology, parse_layout
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.setup import Run, set_up
from muonscale.lab.training.step import train_step
from muonscale.optim.distributed.dtensor import to_local

LAYOUTS = ("fsdp=2", "ddp=2", "tp=2", "tp=2,sp", "fsdp=4", "hsdp=2x2", "ddp=4", "fsdp=2,tp=2")
MIXTURES = ("fsdp=2,ep=2", "fsdp=4,ep=2")
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
WORDS = (
    "data.sequence_length=128",
    "train.batch_tokens=4096",
    "eval.batch_tokens=4096",
    "model.fields.hidden_size=256",
    "model.fields.intermediate_size=704",
    "optimizer.ns_dtype=float32",
)
MIXTURE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "moe_intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


def bytes_by_kind(messages: list[Message]) -> dict[str, int]:
    """Return the bytes sent, by kind of collective."""
    kinds: dict[str, int] = {}
    for message in messages:
        kinds[message.kind] = kinds.get(message.kind, 0) + message.sent
    return kinds


def start(words: list[str], topology: Topology) -> Run:
    """Set a run up on this rank of a world that is there already."""
    config = load_config("demo", words)
    rank = dist.get_rank()
    store = dist.PrefixStore("run", dist.distributed_c10d._get_default_store())
    processes = Processes(topology, rank, rank, torch.device("cpu"), store)
    return set_up(config, RunFolder(config.run.path), RunConsole.silent(), processes)


def counted(words: list[str], layout: str) -> dict[str, Any]:
    """Return bytes sent and memory of this rank in the third step."""
    run = start(words, parse_layout(layout))
    state, config = run.state, run.config
    state.model.train()

    def step() -> None:
        train_step(state, run.batches.at(state.step), config, run.processes)

    step()
    step()
    with Counter() as counter:
        step()
    gradients = sum(to_local(p.grad).nbytes for p in state.model.parameters())
    state.optimizer.zero_grad()
    replicated = run.processes.topology.data == "ddp"  # whose gradients stay in DDP's buckets
    parameters = sum(to_local(p).untyped_storage().nbytes() for p in state.model.parameters())
    optimizer = held_bytes(state.optimizer)
    extra = peak_extra_bytes(step)
    return {
        "sent": dict(counter.sent),
        "parameters": parameters,
        "gradients": gradients,
        "state": optimizer,
        "peak": parameters + optimizer + extra + replicated * gradients,
    }


def said(words: list[str], layout: str, rank: int) -> tuple[dict[str, int], RankMemory]:
    """Return what the plan says of a rank: bytes sent by collective, and memory."""
    planned: ResolvedPlan = resolve(
        PlanRequest(target="demo", overrides=words, layout=layout, device="cpu")
    )
    placed, workload = planned.placement, planned.workload
    flow = activation_flow(planned.shape, planned.model, placed)
    messages = shared_messages(placed, workload, flow)
    messages += optimizer_messages(placed, count_exchanges(placed), rank)
    sent = bytes_by_kind(messages)
    activations = activation_bytes(planned.shape, placed.topology, workload)
    return sent, rank_memory(placed, workload, activations, planned.device.kind, rank)


def ratio(mine: float, theirs: float) -> str:
    """Return said over counted; in bold where it is off by more than a tenth."""
    if not theirs:
        return "-" if not mine else "**not sent**"
    value = mine / theirs
    return f"{value:.3f}" if abs(value - 1) <= 0.1 else f"**{value:.3f}**"


def line(name: str, words: list[str], layout: str) -> str:
    """Return one line of the table, of the rank with most."""
    found = run_on(parse_layout(layout).world, counted, words, layout)
    rank = max(range(len(found)), key=lambda r: sum(found[r]["sent"].values()))
    real, (sent, memory) = found[rank], said(words, layout, rank)
    cells = [name, layout]
    for kind in KINDS:
        here = real["sent"].get(kind, 0)
        small = here < 4096 and not sent.get(kind, 0)  # what ranks agree on: not in the plan
        cells.append("-" if small else f"{here:,.0f} ({ratio(sent.get(kind, 0), here)})")
    total = sum(real["sent"].values())
    cells.append(ratio(sum(sent.get(kind, 0) for kind in KINDS), total))
    parts = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "state": memory.matrix_state + memory.elementwise_state,
        "peak": memory.peak,
    }
    cells += [f"{real[k] / 2**20:.2f} ({ratio(mine, real[k])})" for k, mine in parts.items()]
    return f"| {' | '.join(cells)} |"


def section() -> list[str]:
    """Return the text of the section."""
    from transformers import DeepseekV3Config

    with tempfile.TemporaryDirectory() as folder:
        shape = Path(folder) / "config.json"
        shape.write_text(DeepseekV3Config(**MIXTURE).to_json_string())
        words = [f"run.path={folder}/run", *WORDS]
        plain = [word for word in words if not word.startswith("model.")]
        lines = [line("llama", words, layout) for layout in LAYOUTS]
        mixture = [*plain, f"model.config={shape}"]
        lines += [line("deepseek_v3", mixture, layout) for layout in MIXTURES]
    names = ["model", "layout", *(f"{kind}, bytes" for kind in KINDS), "all, said / counted"]
    names += [f"{part}, MiB" for part in ("parameters", "gradients", "state", "peak")]
    return [
        "The third step of `muonscale train demo` at width 256 (4 layers, feed-forward 704; and a "
        "DeepSeek-V3 of 3 layers, 8 experts, 2 for a token), sequences of 128, 4,096 tokens, float32, "
        "of the rank that sends most: bytes sent by collective as a ring sends them, counted at the "
        "operations of `torch.ops.c10d`; memory of parameters, gradients and state by their tensors, "
        "and the most at one time from the profiler's record of allocations. In brackets what "
        "`muonscale plan` says over what was counted, bold where they differ by more than a tenth.",
        "",
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
        *lines,
        "",
        "Not in the plan: what ranks agree on (gradients that there are and that are finite, the loss, "
        "norms, signals), under 4 KiB a step.",
    ]
