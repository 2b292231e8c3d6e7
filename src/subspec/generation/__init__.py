"""The public API: a model under a memory budget, prompts in, text out."""

from subspec.generation.llm import LLM
from subspec.generation.results import Piece, Result, Statistics

__all__ = ["LLM", "Piece", "Result", "Statistics"]
