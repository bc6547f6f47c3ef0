"""Which optimizer reaches a loss with fewer tokens, after a search of hyper-parameters for each.

`study` makes the runs at every place; `analysis` compares the best settings seed by seed and gives
the verdict (better, likely better, not significantly different); `lengths` compares whole runs of
several lengths; `report` puts it into words.
"""
