"""The training loop and its parts.

The nouns: a `Run` has all parts of a run; its `TrainState` is what checkpoints hold; a
*micro-batch* is what one rank takes through the model at a time; a *metrics record* is one line of
metrics.jsonl.

`setup` (configuration -> `Run`) -> `loop` (every step) -> `step` (forward, backward, clipping,
schedule, optimizer) -> `finish` (validation, sample, model, result). `checkpoint`, `state` and
`background_save` save and resume, `telemetry`, `noise_scale`, `attention`, `router_balance` and
`spikes` measure, `tasks` runs benchmarks, and `trackers` log (`trackers.registry` lists them).

What `setup` builds: `param_groups` (with muP), `schedule`, `load_optimizer_state`, `provenance`
(the origin of the weights), `average` (of the weights). What a step needs: `batches` and
`micro_batches`, `streaming` (waits for tokens), `gradients` (norms, clipping), `validation`,
`out_of_memory` (names the keys that reduce the memory of a step). Around the loop: `console`,
`signals` (Ctrl-C), `profile` and `profiler_memory`, `dry_run`, `baselines` (n-grams),
`checkpoint_reader` (runs no code), and `export` (a checkpoint as a Hugging Face folder, and
`find_checkpoint`: the newest, or that of a step). `extend` begins a longer run with a checkpoint of
a finished one.
"""
