"""What a file of fitted references says that it is."""

SCHEMA, SCHEMA_VERSION = "peel/fit", 1
