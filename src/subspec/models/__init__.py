"""WHAT is computed: configurations, the decoder and its operations, the KV cache.

Knows nothing of tiers, streaming or speculation: a layer is handed its weights' products and a set of rows.
Everything on the target's path is canonical: a row's result depends on that row alone (docs/method.md).
"""
