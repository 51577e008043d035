"""Audits of several checkpoints over time: series, watching, baselines, histories and loggers."""
