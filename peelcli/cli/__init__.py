"""The command line: one command per file, the console, and the one place that ends the process."""
