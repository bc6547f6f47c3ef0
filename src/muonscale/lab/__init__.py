"""Training and studies, on the optimizer library."""
