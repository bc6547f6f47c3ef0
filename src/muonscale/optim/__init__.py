"""The optimizer library. Needs torch alone."""
