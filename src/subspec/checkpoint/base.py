"""What every kind of checkpoint offers: named tensors, read a few rows at a time, and who it is.

Knows nothing of file formats: a format says where its rows are, this class bounds, converts and checks them.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from subspec.errors import ModelError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Checkpoint(ABC):
    """An opened model: its headers are read and checked, its tensors still lie on disk."""

    path: Path
    """The model directory or GGUF file, resolved."""
    name: str
    """Short, of letters, digits, dots, underscores and dashes: for directory names."""
    config: dict[str, Any]
    """In the words of a Hugging Face ``config.json``, with every end-of-text id that its files name."""
    dtype: torch.dtype
    """What :meth:`read` yields: the target's precision."""
    tensors: Mapping[str, tuple[int, ...]]
    """Shapes by Hugging Face name. A tensor whose name is not understood keeps the file's own."""

    _chunk_elements = 4 * 2**20

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows ``[start, stop)`` of a tensor's first dimension, in ``dtype``; a fresh tensor, on the host.

        Beside the result it holds a few megabytes. The file is read, not mapped, so its pages never
        count as the process's memory.

        Raises:
            ModelError: the file ends early or cannot be read, or a weight does not fit ``dtype``.
            KeyError: there is no such tensor.
            IndexError: the rows lie outside the tensor.
        """
        shape = self.tensors[name]
        rows = shape[0] if shape else 1
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows [{start}, {stop}) of {name}, which has {rows}")
        result = torch.empty((stop - start, *shape[1:]), dtype=self.dtype)
        step = self._chunk_rows(name)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            result[first - start : last - start] = self._rows(name, first, last)
        if self.dtype == torch.float16 and not torch.isfinite(result).all():
            raise ModelError(
                f"{self.path.name}: {name} holds values that fp16 cannot: use --dtype bf16 or fp32"
            )
        return result

    def _chunk_rows(self, name: str) -> int:
        """How many rows of a tensor to read at once."""
        row_elements = max(1, torch.Size(self.tensors[name][1:]).numel())
        return max(1, self._chunk_elements // row_elements)

    @abstractmethod
    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The same rows in whatever floating type is at hand."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Which model this is, as JSON, from the files as they are now: sizes, times, hashes of headers.

        Cheap, whatever the model's size: no tensor is read.

        Raises:
            ModelError: a file is gone or cannot be read.
        """

    @abstractmethod
    def export_tokenizer(self, directory: Path) -> None:
        """Write files from which ``transformers.AutoTokenizer`` loads; none if the model has no tokenizer.

        Raises:
            ModelError: the tokenizer is of a kind that needs more than the ``tokenizers`` library.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the files back; reading is over."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def own_precision(stored: Mapping[str, torch.dtype]) -> torch.dtype:
    """The narrowest type that holds every matrix's stored type exactly."""
    found: torch.dtype | None = None
    for dtype in stored.values():
        found = dtype if found is None else torch.promote_types(found, dtype)
    if found is None:
        raise ModelError("the checkpoint holds no weight matrix")
    return found


def checked_precision(dtype: torch.dtype) -> torch.dtype:
    """A precision that the engine computes in.

    Raises:
        ModelError: it is another.
    """
    if dtype not in DTYPES.values():
        raise ModelError(f"weights of type {dtype} are not supported; supported: {', '.join(DTYPES)}")
    return dtype


def safe_name(text: str) -> str:
    """Text as one plain path component."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "model"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, must hold a JSON object")
    return content


def file_state(path: Path) -> dict[str, Any]:
    """Size and time of a file, for an identity.

    Raises:
        ModelError: the file is gone.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def sha256(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
