"""Matrix products: `torch` for any device, `cpu` for symmetric products and one thread per matrix."""
