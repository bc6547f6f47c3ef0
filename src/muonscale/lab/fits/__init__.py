"""Laws fitted to tables of runs, with intervals. Nothing here imports torch.

A table of runs (`tables`) is split into groups. A *law* (`laws`) is fitted to each group and gives
estimates, whose intervals come from *draws*: refits to resampled tables (`bootstrap` makes them;
`laws.base.Law.draw` chooses residuals, points or known noise). A *rung* is a set of runs of about
one size; each is left out in turn (`leave_out`).
`fit_table` does all of this and compares the groups (`ratios`); its `Findings` are written as text,
JSON or a page.

    read_table -> RunTable -> fit_table -> Findings -> format_findings | json | fit_page

Studies use the laws directly, and also `crossing` (what it took to reach a loss), `steps_to_loss`,
`token_optimal`, `rising` and `frontier`. `allocation` computes the best sizes for a budget,
`minimize` has the two searches, `result` what every fit reports, and `statistics` the noise between
seeds and p-values. `findings`, `text` and `page` present the results.
"""
