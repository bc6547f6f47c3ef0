"""Pages about runs and studies: what they hold, and how they are written."""
