"""What the machine offers: memory, processors, batch sizes, threads."""
