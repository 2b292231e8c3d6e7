"""Write a store's files, each whole or not at all: a temporary name, fsync, rename."""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from subspec.checkpoint import Checkpoint
from subspec.memory.disk import drop_cached
from subspec.memory.tiers import page_aligned
from subspec.models.config import ModelConfig
from subspec.store import layout
from subspec.store.manifest import FileRecord
from subspec.substitute.quantize import quantize_tiles

ROWS_A_READ = 4096


@dataclass(frozen=True)
class Task:
    """Files that are made together, by ``run``, which returns their records."""

    files: tuple[str, ...]
    run: Callable[[], dict[str, FileRecord]]


class StoreWriter:
    """Makes the files of one store from an open checkpoint."""

    def __init__(self, directory: Path, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.directory = directory
        self.checkpoint = checkpoint
        self.config = config
        self.itemsize = checkpoint.dtype.itemsize
        self.head = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"

    def tasks(self) -> Iterator[Task]:
        """Every file of the store, in the order of writing."""
        for index in range(self.config.layers):
            names = layout.layer_file(index, "exact"), layout.layer_file(index, "substitute")
            yield Task(names, partial(self._layer, index))
        for index, chunk in enumerate(layout.head_chunks(self.config, self.itemsize)):
            names = layout.head_file(index, "exact"), layout.head_file(index, "substitute")
            yield Task(names, partial(self._head, index, chunk))
        if not self.config.tied_embeddings:
            yield Task(("embedding.exact",), self._embedding)
        yield Task(("small.safetensors",), self._small)
        yield Task(("tokenizer",), self._tokenizer)

    def _layer(self, index: int) -> dict[str, FileRecord]:
        """Both forms of a layer."""
        exact_name = layout.layer_file(index, "exact")
        substitute_name = layout.layer_file(index, "substitute")
        tiles: list[torch.Tensor] = []

        def matrices() -> Iterator[torch.Tensor]:
            for matrix in layout.layer_matrices(self.config, self.itemsize):
                parts = [self.checkpoint.read(layout.layer_tensor(index, part)) for part in matrix.parts]
                weight = torch.cat(parts) if len(parts) > 1 else parts[0]
                tiles.append(quantize_tiles(weight))
                yield weight

        exact = self._write(exact_name, matrices())
        return {exact_name: exact, substitute_name: self._write(substitute_name, tiles)}

    def _head(self, index: int, chunk: layout.Chunk) -> dict[str, FileRecord]:
        """Both forms of a chunk of the output head."""
        exact_name, substitute_name = layout.head_file(index, "exact"), layout.head_file(index, "substitute")
        weight = self.checkpoint.read(self.head, chunk.start, chunk.stop).contiguous()
        exact = self._write(exact_name, [weight])
        return {exact_name: exact, substitute_name: self._write(substitute_name, [quantize_tiles(weight)])}

    def _embedding(self) -> dict[str, FileRecord]:
        """The untied input embedding."""
        return {"embedding.exact": self._write("embedding.exact", self._embedding_rows())}

    def _embedding_rows(self) -> Iterator[torch.Tensor]:
        """The input embedding in runs of rows."""
        for start in range(0, self.config.vocab_size, ROWS_A_READ):
            stop = min(start + ROWS_A_READ, self.config.vocab_size)
            yield self.checkpoint.read("model.embed_tokens.weight", start, stop).contiguous()

    def _small(self) -> dict[str, FileRecord]:
        """Norms and biases by their checkpoint names, and the embedding rows' checksums."""
        vectors = [name for name, shape in self.config.tensors().items() if len(shape) == 1]
        tensors = {name: self.checkpoint.read(name).contiguous() for name in vectors}
        sums = [
            zlib.crc32(row.data)
            for rows in self._embedding_rows()
            for row in _bytes(rows).reshape(len(rows), -1)
        ]
        tensors["embedding.crc32"] = torch.tensor(sums, dtype=torch.int64)
        content = np.frombuffer(bytearray(save(tensors)), dtype=np.uint8)
        name = "small.safetensors"
        return {name: self._write(name, [torch.from_numpy(content)], padded=False)}

    def _tokenizer(self) -> dict[str, FileRecord]:
        """The tokenizer's files; a checkpoint may have none."""
        place = self.directory / "tokenizer"
        place.mkdir(exist_ok=True)
        self.checkpoint.export_tokenizer(place)
        paths = sorted(path for path in place.rglob("*") if path.is_file())
        contents = {str(path.relative_to(self.directory)): path.read_bytes() for path in paths}
        return {name: FileRecord(len(content), zlib.crc32(content)) for name, content in contents.items()}

    def _write(self, name: str, tensors: Iterable[torch.Tensor], *, padded: bool = True) -> FileRecord:
        """Write tensors one after another, padded to whole pages; when this returns they are on disk."""
        path = self.directory / name
        unfinished = path.with_name(name + ".partial")
        crc32 = n_bytes = 0
        with unfinished.open("wb") as file:
            for tensor in tensors:
                content = _bytes(tensor)
                file.write(content.data)
                crc32, n_bytes = zlib.crc32(content.data, crc32), n_bytes + content.size
            padding = bytes(page_aligned(n_bytes) - n_bytes if padded else 0)
            file.write(padding)
            crc32, n_bytes = zlib.crc32(padding, crc32), n_bytes + len(padding)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        drop_cached(path)
        return FileRecord(n_bytes, crc32)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor's bytes, a view (n,)."""
    array: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy()
    return array
