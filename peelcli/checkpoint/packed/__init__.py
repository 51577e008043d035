"""Read checkpoints whose weights are packed in few bits. Each format has one file."""
