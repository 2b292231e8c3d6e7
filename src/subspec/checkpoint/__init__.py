"""From model files to named tensors: safetensors directories, GGUF files and hub ids behind one interface.

First station of ``checkpoint → prepare → store``. Yields Hugging Face tensor names, a config in the same
words, and the tokenizer's files. Knows nothing of what the numbers compute, of substitutes or of tiers.
"""

from __future__ import annotations

from pathlib import Path

import torch

from subspec.checkpoint.base import Checkpoint
from subspec.checkpoint.embedded import DEMO, demo_path, fetch_demo
from subspec.checkpoint.gguf import GgufCheckpoint
from subspec.checkpoint.hub import fetch_snapshot, is_hub_id
from subspec.checkpoint.safetensors import SafetensorsCheckpoint
from subspec.errors import ModelError

__all__ = ["Checkpoint", "demo_path", "fetch_demo", "locate", "open_checkpoint"]


def open_checkpoint(model: str | Path, dtype: torch.dtype | None = None) -> Checkpoint:
    """Open a model for reading, header only; close it after use.

    Args:
        model: ``demo``, a safetensors directory or file, a ``.gguf`` file, or a hub id ``org/name``.
        dtype: what "exact" means; by default the weights' own precision, bf16 for quantized GGUF types.

    Raises:
        ModelError: nothing is there, it is damaged, or it is of a kind that is not understood.
    """
    path = locate(model)
    if path.is_file():
        return GgufCheckpoint(path, dtype)
    name = str(model).replace("/", "--") if is_hub_id(model) and not Path(model).exists() else None
    return SafetensorsCheckpoint(path, dtype, name=name)


def locate(model: str | Path) -> Path:
    """The GGUF file or model directory that ``model`` means; a hub id is downloaded first.

    Raises:
        ModelError: there is no such model.
    """
    if str(model) == DEMO and not Path(DEMO).exists():
        found = demo_path()
        if found is None:
            raise ModelError("the demo model has not been fetched: run `make demo` or `subspec demo` first")
        return found
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".safetensors":
            return path.parent
        if path.suffix == ".gguf":
            return path
        raise ModelError(f"{path} is neither a .gguf nor a .safetensors file")
    if is_hub_id(model):
        return fetch_snapshot(str(model))
    raise ModelError(
        f"{path} does not exist; a model is a directory, a .gguf file, a hub id like org/name, or 'demo'"
    )
