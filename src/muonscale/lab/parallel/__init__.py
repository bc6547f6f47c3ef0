"""Training on many processes: how they are arranged, where parameters lie, what they say to each other."""
