"""Open a checkpoint: check its files, and load a model that keeps one block in memory at a time."""
