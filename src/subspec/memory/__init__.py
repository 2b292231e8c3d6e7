"""WHERE bytes live and how they move: tiers and sizes, arenas, disk reads, the slot ring.

Knows nothing of models, layers or tokens: a thing to stream is a ``Unit``, a named run of bytes.
"""
