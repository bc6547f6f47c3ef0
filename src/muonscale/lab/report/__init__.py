"""Pages about runs and studies. Nothing here imports torch.

A `Page` is data: sections of text, tables, verdicts and charts (`page`). `html` and `markdown`
write it, `plotly_charts` and `matplotlib_charts` draw its charts in the colors of `palette`, and
`write` makes all files of a page.

Runs: `run_data` (a folder) -> `run_measures`, `run_tables` -> `runs` (the page). A new curve is a
row of `run_measures`. `folders` decides what a path is: a run, a study or a coordinate check.
"""
