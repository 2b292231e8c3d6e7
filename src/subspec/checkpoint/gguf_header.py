"""A GGUF file's header: its metadata and where each tensor lies.

The ``gguf`` package's reader makes a NumPy array of every token in the vocabulary (10 s and 490 MiB for
152,000 of them) and maps the file; an engine that opens a model at each start and promises its memory needs
the header alone. Long arrays are passed over. Knows nothing of models.

Source: ggml, ``docs/gguf.md``, versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from subspec.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEPT_ARRAY = 1024
_LONGEST_NAME = 65535
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place: shape with rows first, ``offset`` from the start of the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def row_elements(self) -> int:
        """Elements in one index of the first dimension."""
        return math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return self.row_elements // block * block_bytes


@dataclass(frozen=True)
class GgufHeader:
    """``metadata`` without arrays longer than 1024; ``size`` is the header's length in bytes."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    size: int


def read_header(path: Path) -> GgufHeader:
    """Read and check a header.

    Raises:
        ModelError: no GGUF file, truncated, corrupt, or with a tensor type that is not known.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, file, path.stat().st_size).header()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error


class _Reader:
    """One pass over the header."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size

    def header(self) -> GgufHeader:
        if self._take(4) != b"GGUF":
            raise ModelError(f"{self._path} is no GGUF file: it does not begin with 'GGUF'")
        version, tensor_count, field_count = self._unpack("I"), self._unpack("Q"), self._unpack("Q")
        if version not in (2, 3):
            raise ModelError(
                f"{self._path} is a GGUF file of version {version}; supported: 2 and 3, little-endian"
            )
        metadata: dict[str, Any] = {}
        for _ in range(field_count):
            key = self._string()
            metadata[key] = self._value(self._unpack("I"))
        entries = [self._tensor() for _ in range(tensor_count)]
        size = self._file.tell()
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ModelError(f"{self._path} is corrupt: general.alignment is {alignment}, no power of two")
        base = -(-size // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise ModelError(f"{self._path} is corrupt: tensor {name} appears twice")
            tensors[name] = self._place(name, shape, kind, base + offset)
        return GgufHeader(metadata, tensors, size)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._unpack("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ModelError(f"{self._path} is corrupt: tensor {name} has {dimensions} dimensions")
        shape = tuple(self._unpack("Q") for _ in range(dimensions))
        return name, shape[::-1], self._unpack("I"), self._unpack("Q")

    def _place(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        """A tensor that lies within the file and whose rows are whole blocks."""
        try:
            known = GGMLQuantizationType(kind)
        except ValueError as error:
            raise ModelError(f"{self._path}: tensor {name} has type {kind}, which is not known") from error
        tensor = GgufTensor(shape, known, offset)
        block = GGML_QUANT_SIZES[known][0]
        if tensor.row_elements % block:
            raise ModelError(
                f"{self._path} is corrupt: rows of {name} {shape} are no whole {known.name} blocks"
            )
        end = offset + shape[0] * tensor.row_bytes
        if end > self._size:
            raise ModelError(
                f"{self._path} is truncated: {name} ends at byte {end}, the file at {self._size}"
            )
        return tensor

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string(self._size)
        if kind != _ARRAY:
            return self._unpack(self._scalar(kind))
        element, count = self._unpack("I"), self._unpack("Q")
        if element == _STRING:
            return self._strings(count)
        code = self._scalar(element)
        data = self._take(struct.calcsize("<" + code) * count)
        return list(struct.unpack(f"<{count}{code}", data)) if count <= _KEPT_ARRAY else None

    def _strings(self, count: int) -> list[str] | None:
        """A list of strings; a long one is passed over."""
        if count <= _KEPT_ARRAY:
            return [self._string(self._size) for _ in range(count)]
        for _ in range(count):
            self._take(self._unpack("Q"))
        return None

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ModelError(f"{self._path} is corrupt: metadata of type {kind}, which is not known")
        return _SCALARS[kind]

    def _string(self, longest: int = _LONGEST_NAME) -> str:
        length = self._unpack("Q")
        if length > longest:
            raise ModelError(f"{self._path} is corrupt: a name of {length} bytes in its header")
        return self._take(length).decode("utf-8", "replace")

    def _unpack(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _take(self, size: int) -> bytes:
        if size > self._size:
            raise ModelError(f"{self._path} is truncated or corrupt: its header claims {size} bytes more")
        data = self._file.read(size)
        if len(data) < size:
            raise ModelError(f"{self._path} is truncated: its header ends at byte {self._size}")
        return data
