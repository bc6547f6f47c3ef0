"""Hyper-parameters found at one width, used at another. Needs torch alone."""
