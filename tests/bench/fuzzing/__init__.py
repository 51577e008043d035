"""What `fuzz.py` is made of: how files are damaged, which commands read them, and a server that runs these commands.

A module of mutators has `MUTATORS`, a dict from a name to `mutate(rng, source, target)`, which writes a damaged copy of
`source` to `target`. The same `rng` gives the same copy.
"""
