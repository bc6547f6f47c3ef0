"""Whether the best learning rate stays the same when the width grows."""
