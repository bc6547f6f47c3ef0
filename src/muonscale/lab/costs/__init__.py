"""What training a model would cost on so many devices: pure functions of configuration and arrangement."""
