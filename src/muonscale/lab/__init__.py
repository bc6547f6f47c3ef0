"""Training, checks and studies, on the optimizer library.

The rooms, from the bottom to the top; each imports only those before it:

- `files`, `config`, `run_folder`, `eval_results`: what is on disk: configurations, a run's folder,
  its evaluations.
- `report`, `console`, `fits`: pages, tables for a console, laws fitted to tables. They read what is
  on disk and import no torch.
- `data`, `models`, `parallel`, `training`: from text to batches, from a configuration to a model,
  its ranks, and the loop. `targets` resolves what a user names: a recipe, preset, run or model.
- `evaluation`, `estimate`, `verify`, `coordcheck`, `bench`: what a model is worth, what a run would
  cost, whether a layout and a parametrization are right, how long a step takes.
- `studies`: many runs, planned and read together.
"""
