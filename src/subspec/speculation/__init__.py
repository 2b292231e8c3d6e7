"""The METHOD: grow a tree with the draft, verify it with the target, commit the path they agree on.

Tensors and token ids in, token ids out; no I/O, no tiers.  The model is two passes behind a protocol.
"""
