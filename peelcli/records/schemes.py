"""The names of quantisation schemes, granularities and scale rules."""

from __future__ import annotations

INTEGERS = ("int2", "int3", "int4", "int5", "int6", "int7", "int8")
SCHEMES = ("binary", "ternary", *INTEGERS[:3], "nf4", *INTEGERS[3:], "fp8_e4m3", "fp")
GRANULARITIES = ("tensor", "channel", "group")
SCALE_RULES = ("absmean", "absmax", "mse")
