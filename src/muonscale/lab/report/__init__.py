"""Pages about runs and studies. Nothing here imports torch.

A `Page` is data: sections of text, tables, verdicts and charts (`page`). `html` (which fills
`templates/`, one for each block) and `markdown` write it, `plotly_charts` and `matplotlib_charts`
draw its charts in the colors of `palette`, `write` makes all files of a page, and `serve` shows it
in a browser while runs go on. `check` refuses a page that cannot be drawn, `axes` has the ranges
and ticks of both renderers, and `tables` writes CSV.

Runs: `run_data` (a folder) -> `run_measures` (which curves there are) -> `measure_charts` (thins
and smooths them), `run_tables`, `tiles` (the result at the top) -> `runs` (the page). A new curve
is a row of `run_measures`. `loss_figure` and `eval_table` are made for the trainer and the
evaluation. `folders` decides what a path is: a run, a study or a coordinate check.
"""
