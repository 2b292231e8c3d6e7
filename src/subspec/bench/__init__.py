"""Measure decoding on prompts: read them, run the modes in turn, measure the link meanwhile, report.

Sits on ``LLM`` and knows nothing of the engine behind it.
"""
