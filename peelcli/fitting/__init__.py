"""References fitted to a model's blocks: to their states, to the network's loss, and along paths."""
