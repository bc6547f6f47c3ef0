"""Conversations as training data.

`conversations` reads records -> `template` writes them out and says which part is the assistant's ->
`tokenize` -> `store` keeps tokens on disk -> `pack` says which conversations share a row.
"""
