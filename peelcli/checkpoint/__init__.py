"""Open a checkpoint: what lies on disk, and a model whose blocks come into memory one at a time."""
