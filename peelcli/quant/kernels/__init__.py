"""Hot tensor functions. Every one has an eager version, which is its specification and runs anywhere.

Triton kernels stand in `triton_*`; they are imported by the first call that takes one, and `choice` says when that is.
"""
