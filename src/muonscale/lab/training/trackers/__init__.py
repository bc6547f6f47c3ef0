"""Trackers log the metrics of a run to other tools. Each has its own file; see `registry`."""
