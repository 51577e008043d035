"""The machine's resources: memory, processors, batch sizes, threads, locks and durable files."""
