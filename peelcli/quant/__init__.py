"""Low-bit schemes as pure tensor functions: quantise, pack, recognise. Importing this imports no torch."""
