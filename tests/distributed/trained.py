"""Arrangements of the trainer that are compared with one process, as (architecture, layout)."""

from __future__ import annotations

STEPS = 20
TOLERANCE = 1e-3
"""Relative, of losses; twice that of validation losses and updates, 20 times that of norms."""

ROWS = [
    ("llama", "ddp=2"),
    ("llama", "fsdp=2"),
    ("llama", "fsdp=3"),
    ("llama", "fsdp=4"),
    ("llama", "hsdp=2x2"),
    ("llama", "tp=2"),
    ("llama", "tp=2,sp"),
    ("gemma3", "fsdp=2,tp=2"),
    ("llama_tied", "fsdp=2,tp=2,sp"),
    ("gpt2", "fsdp=2"),
    ("deepseek_v3", "fsdp=2"),
    ("deepseek_v3", "fsdp=2,ep=2"),
    ("deepseek_v3", "fsdp=4,ep=2"),
    ("mixtral", "ddp=2,ep=2"),
]

VARIANTS: dict[str, list[str]] = {
    "normuon": ["optimizer.post_norm=normuon"],
    "muon_plus": [
        "optimizer.post_norm=row_col",
        "optimizer.clip=all",
        "optimizer.max_grad_norm=0.5",
    ],
    "constrained": [
        "optimizer.constraint=weight_norm",
        "optimizer.pre_norm=row",
        "optimizer.second_moment=update",
    ],
    "adamw": ["optimizer.rule=adamw", "optimizer.lr=0.003"],
    "recomputed": ["train.activation_checkpointing=true", "train.micro_batch_tokens=32"],
    "telemetry": ["telemetry.every=5"],
    "transfer": [
        "transfer.base={hidden_size: 8, num_attention_heads: 1, num_key_value_heads: 1}",
        "optimizer.overrides={model.norm.weight: {weight_decay: 0}}",  # of a tied Gemma
    ],
    "stages": [
        "train.steps=null",
        "train.tokens=7680",
        "train.batch_tokens=256",
        "train.batch_schedule=[{after: 2560, batch_tokens: 512}]",  # ten steps of each
        "train.micro_batch_tokens=32",
        "schedule.name=stages",
        "schedule.stages=[{name: constant, until: 0.5, warmup: 3}, {name: linear, final: 0.2}]",
    ],
}
"""What else a run may be, on each of:"""
VARIANT_ROWS = [("llama", "ddp=2"), ("gemma3", "fsdp=2,tp=2"), ("mixtral", "fsdp=4,ep=2")]

ARRANGEMENTS = [
    ("llama", "ddp=2"),
    ("gpt2", "fsdp=2"),
    ("llama_tied", "tp=2"),
    ("gemma3", "tp=2,sp"),
    ("mixtral", "fsdp=2,ep=2"),
    ("deepseek_v3", "ddp=2,ep=2"),
    ("deepseek_v3", "tp=2"),
    ("llama", "fsdp=3"),
    ("llama", "hsdp=2x2"),
    ("llama_tied", "fsdp=2,tp=2,sp"),
    ("deepseek_v3", "fsdp=4,ep=2"),
    ("mixtral", "fsdp=4,ep=4"),
]
"""Whose raw gradients of one batch are compared, and where whose parameters lie.

Of every layout and every architecture at least one; of the others, which only slow tests take:
"""

MORE_ARRANGEMENTS = [
    ("llama", "fsdp=2"),
    ("llama_tied", "fsdp=2"),
    ("gpt2", "ddp=2"),
    ("llama", "tp=2"),
    ("gemma3", "tp=2"),
    ("llama", "tp=2,sp"),
    ("llama", "fsdp=2,tp=2"),
    ("gemma3", "fsdp=2,tp=2"),
    ("deepseek_v3", "fsdp=2,tp=2"),
    ("mixtral", "ddp=4,ep=4"),
]
