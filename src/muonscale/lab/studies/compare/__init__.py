"""Which optimizer reaches a loss with fewer tokens: learning rates are swept for each of them."""
