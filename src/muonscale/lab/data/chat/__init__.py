"""Conversations as training data.

`conversations` reads records -> `template` renders them and finds the assistant's turns ->
`tokenize` makes tokens and targets -> `store` keeps them on disk and packs them into rows.
"""
