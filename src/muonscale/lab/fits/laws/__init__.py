"""The laws: one module each, registered in `registry.LAWS`. `base.Law` says what a law is."""
