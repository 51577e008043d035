"""More than one checkpoint, more than one night: series, watching, baselines, histories and loggers."""
