"""Hot tensor functions. Every one has an eager version, in `eager`, which is its specification and runs anywhere."""
