"""Loss against compute: a ladder of model sizes, and the laws fitted to it."""
