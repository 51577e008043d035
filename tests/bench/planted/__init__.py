"""The planted-fault suite: small decoders with one layer hurt, what that does to them, and who finds it."""
