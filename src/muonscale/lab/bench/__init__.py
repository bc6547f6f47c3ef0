"""How long a step of the optimizer takes: the measuring, and `muonscale bench` for a user's model."""
