"""The references: what may stand in for a part of the network, and how each is fitted. Tensors only, never files."""
