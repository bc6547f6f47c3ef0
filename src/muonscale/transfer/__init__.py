"""Transfer of hyper-parameters from one width to another. Needs only torch."""
