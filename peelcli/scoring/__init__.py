"""States carried to the loss: the trained model's own, and those of replaced blocks."""
