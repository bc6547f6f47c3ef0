"""Coordinate checks: whether a parametrization keeps a model the same at every width."""
