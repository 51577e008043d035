"""Checkpoints whose weights are packed in few bits: one file per format, and what turns them into plain weights."""
