"""Evaluate a trained model: validation loss and perplexity, samples, benchmark tasks.

`target` (the model and the settings) -> `perplexity`, tasks of `lab.harness` with `suites` ->
`command` (eval).
"""
