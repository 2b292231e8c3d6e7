"""The same tiny model twice: under ``transformers`` and under the engine, with rows of logits to compare."""

from pathlib import Path

import torch
import transformers

from subspec import LLM
from subspec.engine import Engine
from subspec.models.decoder import prefix_rows
from subspec.speculation.tree import DraftTree


def load_reference(directory: Path) -> transformers.PreTrainedModel:
    """The model under ``transformers``: eager attention, fp32."""
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model  # in evaluation mode, as loaded


@torch.no_grad()
def reference_logits(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Logits (T, V) of a text, in one pass."""
    logits: torch.Tensor = model(torch.tensor([tokens])).logits
    return logits[0]


def open_engine(model: Path, store: Path, **options: int) -> LLM:
    """The model under the engine, in fp32."""
    settings = {"context": 200, "depth": 6, "width": 4} | options
    return LLM(model, "64MiB", store=store, dtype="float32", **settings)  # type: ignore[arg-type]


def prefill(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """Logits (T, V) of a text in one sweep."""
    return engine.target(prefix_rows(tokens, 0), last_only=False)


def decode_cached(engine: Engine, tokens: list[int], start: int) -> torch.Tensor:
    """Logits (T − start, V): a sweep a token over the cached prefix of ``start`` tokens."""
    prefill(engine, tokens[:start])
    rows = [
        engine.target(prefix_rows([token], place), last_only=True)[0]
        for place, token in enumerate(tokens[start:], start)
    ]
    return torch.stack(rows)


def verify_tree(engine: Engine, prefix: list[int], tree: DraftTree) -> torch.Tensor:
    """Logits (N, V) of every node of a tree below a cached prefix."""
    prefill(engine, prefix)
    return engine.target(tree.rows(list(range(len(tree)))), last_only=False)
