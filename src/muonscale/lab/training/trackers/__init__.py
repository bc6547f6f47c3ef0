"""Trackers: where a run is followed while it goes, besides its folder. One file for each of them."""
