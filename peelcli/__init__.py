"""peel: audit a transformer checkpoint, layer by layer. Importing this imports no torch."""

__version__ = "0.2.0"
