"""The two small checkpoints that `peel demo` audits; README.md beside this file says how they were made."""
