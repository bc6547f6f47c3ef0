"""The models that are trained: Hugging Face classes, built from named shapes or config files."""
