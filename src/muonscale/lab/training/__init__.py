"""The training loop and its parts.

The nouns: a `Run` has all parts of a run; its `TrainState` is what checkpoints hold; a
*micro-batch* is what one rank takes through the model at a time; a *metrics record* is one line of
metrics.jsonl.

`setup` (configuration -> `Run`) -> `loop` (every step) -> `step` (forward, backward, clipping,
schedule, optimizer) -> `finish` (validation, sample, model, result). `checkpoint` and `state` save
and resume, `telemetry`, `noise_scale`, `attention`, `router_balance` and `spikes` measure,
and `trackers` log (`trackers.registry` lists them).
"""
