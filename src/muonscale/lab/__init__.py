"""Training, checks and studies, on the optimizer library.

The layers, lowest first; each imports only from layers listed before it:

- `files`, `config`, `run_folder`, `eval_results`: what is on disk: configurations, a run's folder,
  its evaluations.
- `report`, `console`, `fits`: pages, tables for a console, laws fitted to tables. They read what is
  on disk and import no torch.
- `data`, `models`, `parallel`, `training`: from text to batches, from a configuration to a model,
  its ranks, and the loop. `devices` has the rates of GPUs. `targets` resolves what a user names: a
  recipe, preset, run or model.
- `harness` runs benchmark tasks, for `training` and `evaluation`.
- `evaluation` (how good a model is), `estimate` (what a run would cost), `verify` (whether a layout
  is right), `coordcheck` (whether a parametrization is right), `bench` (how long a step takes).
- `studies`: many runs, planned and read together.
"""
