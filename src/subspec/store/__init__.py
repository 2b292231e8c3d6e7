"""The PREPARED model on disk: exact images to stream, substitutes to keep, and a manifest that names them.

A store runs alone: it carries the configuration and the tokenizer's files.  ``layout`` says what lies where,
``prepare`` writes, ``reader`` opens.
"""
