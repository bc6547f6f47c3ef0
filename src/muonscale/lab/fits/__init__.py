"""Laws fitted to tables of losses, with intervals. No torch."""
