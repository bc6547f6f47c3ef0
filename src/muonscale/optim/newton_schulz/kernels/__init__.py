"""Matrix products: `torch` for any device, `cpu` for panels of symmetric ones and a thread per matrix."""
