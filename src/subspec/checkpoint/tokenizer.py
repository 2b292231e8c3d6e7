"""A tokenizer's files: which they are, and how to take them along.

Knows nothing of what a tokenizer does; ``transformers`` loads what is written here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from subspec.errors import ModelError

PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
_ONLY_WITH_MORE = ("tokenizer.model", "*.tiktoken", "tekken.json", "spiece.model")


def tokenizer_files(directory: Path) -> list[Path]:
    """The files that a tokenizer is loaded from, those that are there."""
    return [path for pattern in PATTERNS for path in sorted(directory.glob(pattern))]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a model directory's tokenizer; a directory without one gives nothing.

    Raises:
        ModelError: it has only a sentencepiece or tiktoken file, or a file cannot be copied.
    """
    names = {path.name for path in tokenizer_files(source)}
    if "tokenizer.json" not in names and not names >= {"vocab.json", "merges.txt"}:
        other = [path.name for pattern in _ONLY_WITH_MORE for path in source.glob(pattern)]
        if other:
            raise ModelError(
                f"{source} has its tokenizer only as {other[0]}, no tokenizer.json: write one with "
                "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...), with "
                "sentencepiece or tiktoken installed"
            )
        return
    try:
        for path in tokenizer_files(source):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        # AutoTokenizer asks the model's config where tokenizer_config.json names no class.
        shutil.copyfile(source / "config.json", target / "config.json")
    except OSError as error:
        raise ModelError(f"the tokenizer of {source} cannot be copied to {target}: {error}") from error
