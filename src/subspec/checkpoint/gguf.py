"""A GGUF file as a checkpoint: rows are dequantized when read, and Llama's rows are put back in order.

llama.cpp turns each head's two halves of a Llama Q or K projection into neighbouring pairs; Hugging Face's
decoder, and ours, want the halves. Knows nothing of which tensors a model needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from subspec.checkpoint.base import (
    Checkpoint,
    checked_precision,
    file_state,
    own_precision,
    safe_name,
    sha256,
)
from subspec.checkpoint.files import ByteFile
from subspec.checkpoint.gguf_config import ROPE_DIVISORS, hf_config, hf_name
from subspec.checkpoint.gguf_header import GgufTensor, read_header
from subspec.checkpoint.gguf_tokenizer import export_gguf_tokenizer
from subspec.errors import ModelError

_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_PAIRED = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")


class GgufCheckpoint(Checkpoint):
    """A GGUF file, opened."""

    # Stays in the processor's cache, and below the size from which torch's conversion would start threads.
    _chunk_elements = 2**15

    def __init__(self, path: Path, dtype: torch.dtype | None = None) -> None:
        self.path = path.resolve()
        self.name = safe_name(path.stem)
        header = read_header(self.path)
        try:
            self.config = hf_config(header.metadata, {key: t.shape for key, t in header.tensors.items()})
        except ModelError as error:
            raise ModelError(f"{self.path}: {error}") from error
        stored = dict(header.tensors)
        divisors = stored.pop(ROPE_DIVISORS, None)
        self._has_tokenizer = "tokenizer.ggml.model" in header.metadata
        self._paired = self.config["model_type"] == "llama"
        self._stored = {hf_name(key): tensor for key, tensor in stored.items()}
        self.tensors = {key: tensor.shape for key, tensor in self._stored.items()}
        for key, tensor in self._stored.items():
            _check_readable(self.path, key, tensor.kind)
        matrices = {
            key: _FLOATS.get(tensor.kind, torch.bfloat16)
            for key, tensor in self._stored.items()
            if len(tensor.shape) == 2
        }
        quantized = any(len(t.shape) == 2 and t.kind not in _FLOATS for t in self._stored.values())
        self.dtype = checked_precision(dtype or (torch.bfloat16 if quantized else own_precision(matrices)))
        self._file = ByteFile(self.path)
        if divisors is not None:
            self.config["rope_parameters"]["frequency_divisors"] = self._decode(
                divisors, 0, divisors.shape[0]
            ).tolist()

    def _chunk_rows(self, name: str) -> int:
        rows = super()._chunk_rows(name)
        head = int(self.config["head_dim"])
        return max(head, rows // head * head) if self._is_paired(name) else rows

    def _is_paired(self, name: str) -> bool:
        return self._paired and name.endswith(_PAIRED)

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self._stored[name]
        if not self._is_paired(name):
            return self._decode(tensor, start, stop)
        head = int(self.config["head_dim"])
        first, last = start // head * head, min(-(-stop // head) * head, tensor.shape[0])
        rows = torch.arange(start, stop)
        half, pair = rows % head // (head // 2), rows % (head // 2)
        return self._decode(tensor, first, last)[rows // head * head + 2 * pair + half - first]

    def _decode(self, tensor: GgufTensor, start: int, stop: int) -> torch.Tensor:
        """Rows in the file's own order, fp32 unless they are stored in another float type."""
        shape = (stop - start, *tensor.shape[1:])
        raw = self._file.read(tensor.offset + start * tensor.row_bytes, (stop - start) * tensor.row_bytes)
        if tensor.kind in _FLOATS:
            return raw.view(_FLOATS[tensor.kind]).reshape(shape)
        # As one long row: the library works through 16 rows at a time, too few where rows are short.
        blocks = raw.numpy().reshape(1, -1)
        return torch.from_numpy(dequantize(blocks, tensor.kind)).reshape(shape)

    def identity(self) -> dict[str, Any]:
        """See :meth:`Checkpoint.identity`."""
        state = file_state(self.path)
        size = read_header(self.path).size
        file = ByteFile(self.path)
        try:
            state["header_sha256"] = sha256(file.read_bytes(0, size))
        finally:
            file.close()
        return {"kind": "gguf", "path": str(self.path), "files": {self.path.name: state}}

    def export_tokenizer(self, directory: Path) -> None:
        """Convert the tokenizer in the header."""
        if self._has_tokenizer:
            export_gguf_tokenizer(self.path, directory)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _check_readable(path: Path, name: str, kind: GGMLQuantizationType) -> None:
    """Refuse types that cannot be dequantized, before anything is read."""
    if kind in _FLOATS:
        return
    block = np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    try:
        dequantize(block, kind)
    except NotImplementedError as error:
        raise ModelError(
            f"{path}: tensor {name} has type {kind.name}, which cannot be dequantized"
        ) from error
