"""One law a module: its parameters, its fit, its prediction."""
