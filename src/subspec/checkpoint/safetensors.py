"""A Hugging Face directory: ``config.json`` and safetensors, one file or shards with an index.

The header is checked completely before any weight is read. Knows nothing of which tensors a model needs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from subspec.checkpoint.base import (
    Checkpoint,
    checked_precision,
    file_state,
    own_precision,
    read_json,
    safe_name,
    sha256,
)
from subspec.checkpoint.files import ByteFile
from subspec.checkpoint.tokenizer import copy_tokenizer, tokenizer_files
from subspec.errors import ModelError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX = "model.safetensors.index.json"
_LARGEST_HEADER = 100 * 2**20
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx")


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: ``offset`` counts from the start of its file."""

    file: ByteFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class SafetensorsCheckpoint(Checkpoint):
    """A model directory, opened."""

    def __init__(self, path: Path, dtype: torch.dtype | None = None, name: str | None = None) -> None:
        self.path = path.resolve()
        self.name = safe_name(name or self.path.name)
        self.config = _config(self.path)
        self._files: dict[str, ByteFile] = {}
        try:
            self._stored = self._open()
            self.tensors = {key: stored.shape for key, stored in self._stored.items()}
            matrices = {key: stored.dtype for key, stored in self._stored.items() if len(stored.shape) == 2}
            self.dtype = checked_precision(dtype or own_precision(matrices))
        except ModelError:
            self.close()
            raise

    def _open(self) -> dict[str, _Stored]:
        """Open every shard and join their headers."""
        names, index = _shards(self.path)
        found: dict[str, _Stored] = {}
        for name in names:
            self._files[name] = ByteFile(self.path / name)
            header = _parse(self._files[name])
            twice = found.keys() & header.keys()
            if twice:
                raise ModelError(
                    f"{self.path}: tensor {min(twice)} lies in two of the files {', '.join(names)}"
                )
            found |= header
            absent = [key for key, shard in index.items() if shard == name and key not in header]
            if absent:
                raise ModelError(
                    f"{self.path / name} lacks {len(absent)} tensors of {_INDEX}, first {absent[0]}"
                )
        return found

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        stored = self._stored[name]
        shape = (stop - start, *stored.shape[1:])
        row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        raw = stored.file.read(stored.offset + start * row_bytes, (stop - start) * row_bytes)
        return raw.view(stored.dtype).reshape(shape)

    def identity(self) -> dict[str, Any]:
        """See :meth:`Checkpoint.identity`; the tokenizer's files count by size and time."""
        files: dict[str, dict[str, Any]] = {}
        for name in self._files:
            file = ByteFile(self.path / name)
            try:
                files[name] = file_state(file.path) | {"header_sha256": sha256(_header(file))}
            finally:
                file.close()
        for name in ("config.json", "generation_config.json", _INDEX):
            if (self.path / name).exists():
                files[name] = file_state(self.path / name) | {
                    "sha256": sha256((self.path / name).read_bytes())
                }
        for path in tokenizer_files(self.path):
            files.setdefault(path.name, file_state(path))
        return {"kind": "safetensors", "path": str(self.path), "files": files}

    def export_tokenizer(self, directory: Path) -> None:
        """Copy the tokenizer's files as they are."""
        copy_tokenizer(self.path, directory)

    def close(self) -> None:
        """Close every shard."""
        for file in self._files.values():
            file.close()


def _config(directory: Path) -> dict[str, Any]:
    """``config.json`` with the end-of-text ids of ``generation_config.json`` joined in."""
    path = directory / "config.json"
    if not path.exists():
        gguf = sorted(directory.glob("*.gguf"))
        hint = (
            f"; it holds {gguf[0].name}: name that file"
            if gguf
            else "; is it a Hugging Face model directory?"
        )
        raise ModelError(f"{directory} has no config.json{hint}")
    config = read_json(path)
    generation = directory / "generation_config.json"
    if generation.exists():
        ids: list[Any] = []
        for source in (config, read_json(generation)):
            value = source.get("eos_token_id")
            ids += value if isinstance(value, list) else [] if value is None else [value]
        if ids:
            config["eos_token_id"] = list(dict.fromkeys(ids))
    return config


def _shards(directory: Path) -> tuple[list[str], dict[str, str]]:
    """File names, and which tensor the index promises in which (nothing for a single file)."""
    if not (directory / _INDEX).exists():
        return [_single(directory)], {}
    index = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise ModelError(f"{directory / _INDEX} has no weight_map of tensor names to file names")
    names = sorted(set(index.values()))
    foreign = [name for name in names if Path(name).name != name]
    if foreign:
        raise ModelError(f"{directory / _INDEX} names {foreign[0]!r}, which is no plain file name")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelError(f"{directory} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}")
    return names, index


def _single(directory: Path) -> str:
    """The one safetensors file of a directory without an index."""
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if "model.safetensors" in names:
        return "model.safetensors"
    if len(names) == 1:
        return names[0]
    if names:
        raise ModelError(
            f"{directory} holds {len(names)} safetensors files but no {_INDEX}: {', '.join(names[:4])}"
        )
    other = sorted(path.name for pattern in _OTHER_WEIGHTS for path in directory.glob(pattern))
    if other:
        raise ModelError(
            f"{directory} holds {other[0]} but no safetensors, the only format read from a directory: "
            "convert it with transformers' save_pretrained"
        )
    raise ModelError(f"{directory} holds no safetensors file")


def _header(file: ByteFile) -> bytes:
    """The JSON header's bytes."""
    size = int.from_bytes(file.read_bytes(0, 8), "little")
    if size > _LARGEST_HEADER:
        raise ModelError(
            f"{file.path} is corrupt: its header claims {size} bytes, at most {_LARGEST_HEADER} may be"
        )
    return file.read_bytes(8, size)


def _parse(file: ByteFile) -> dict[str, _Stored]:
    """Every tensor of a file, with bounds and sizes checked against the file's length."""
    header = _header(file)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        items = [(key, str(e["dtype"]), tuple(e["shape"]), *e["data_offsets"]) for key, e in entries.items()]
        numbers = [number for _, _, shape, begin, end in items for number in (*shape, begin, end)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{file.path} is corrupt: its {len(header)}-byte header is not a tensor list"
        ) from error
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ModelError(f"{file.path} is corrupt: a shape or offset in its header is no whole number")
    base = 8 + len(header)
    _check_end(file, base + max((end for *_, end in items), default=0))
    return {key: _entry(file, base, key, kind, shape, begin, end) for key, kind, shape, begin, end in items}


def _check_end(file: ByteFile, end: int) -> None:
    """The data must end where the file does."""
    if end > file.size:
        raise ModelError(f"{file.path} is truncated: its tensors end at byte {end}, it has {file.size}")
    if end < file.size:
        raise ModelError(f"{file.path} is corrupt: its tensors end at byte {end}, but it has {file.size}")


def _entry(
    file: ByteFile, base: int, key: str, kind: str, shape: tuple[int, ...], begin: int, end: int
) -> _Stored:
    """One tensor's place, if its type is known and its extent is what its shape says."""
    if kind not in _DTYPES:
        raise ModelError(f"{file.path}: tensor {key} has type {kind}; supported: {', '.join(_DTYPES)}")
    dtype = _DTYPES[kind]
    size = math.prod(shape) * dtype.itemsize
    if end - begin != size:
        raise ModelError(
            f"{file.path} is corrupt: {key} {shape} {kind} needs {size} bytes, has {end - begin}"
        )
    return _Stored(file, dtype, shape, base + begin)
