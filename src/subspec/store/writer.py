"""Write a store's files, each whole or not at all: a temporary name, fsync, rename.

Before a residual's file is written, the exact weight is rebuilt from it and compared with its source.  The
codes of substitutes are chosen by what ``activations`` says, if the model has a tokenizer.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save

from subspec.checkpoint import Checkpoint
from subspec.errors import StoreError
from subspec.memory.disk import drop_cached
from subspec.memory.tiers import page_aligned
from subspec.models.config import ModelConfig
from subspec.store import layout
from subspec.store.activations import MOST_TOKENS, Activations
from subspec.store.manifest import FileRecord
from subspec.store.sample_text import SAMPLE_TEXT
from subspec.substitute import images
from subspec.substitute.quantize import quantize_tiles
from subspec.substitute.residual import decode_rows, encode

ROWS_A_READ = 4096
_COMPARED_ROWS = 4096
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Task:
    """Files made together from ``source_bytes`` of weights, by ``run``, which returns their records."""

    files: tuple[str, ...]
    source_bytes: int
    run: Callable[[], dict[str, FileRecord]]


class StoreWriter:
    """Makes the files of one store from an open checkpoint, in a codec of ``layout.CODECS``."""

    def __init__(self, directory: Path, checkpoint: Checkpoint, config: ModelConfig, codec: str) -> None:
        self.directory = directory
        self.checkpoint = checkpoint
        self.config = config
        self.itemsize = checkpoint.dtype.itemsize
        self.form = layout.CODECS[codec]
        self.head = EMBEDDING if config.tied_embeddings else "lm_head.weight"

    def tasks(self) -> Iterator[Task]:
        """Every file of the store, in the order of writing."""
        row_bytes = self.config.hidden_size * self.itemsize
        layer_bytes = layout.layer_bytes(self.config, self.itemsize)[0]
        for index in range(self.config.layers):
            names = layout.layer_file(index, self.form), layout.layer_file(index, "substitute")
            yield Task(names, layer_bytes, partial(self._layer, index))
        for index, chunk in enumerate(layout.head_chunks(self.config, self.itemsize)):
            names = layout.head_file(index, self.form), layout.head_file(index, "substitute")
            yield Task(names, (chunk.stop - chunk.start) * row_bytes, partial(self._head, index, chunk))
        if not self.config.tied_embeddings:
            yield Task(("embedding.exact",), self.config.vocab_size * row_bytes, self._embedding)
        yield Task(("small.safetensors",), 0, self._small)
        yield Task(("tokenizer",), 0, self._tokenizer)

    def _layer(self, index: int) -> dict[str, FileRecord]:
        """Both forms of a layer."""
        digests: dict[str, str] = {}
        weights = self._matrices(index, digests)
        importance: list[torch.Tensor | None] = [None] * len(weights)
        if self._activations is not None:
            importance = [*self._activations.layer(index, weights)]
        return self._both_forms(partial(layout.layer_file, index), weights, importance, digests)

    def _matrices(self, index: int, digests: dict[str, str] | None = None) -> list[torch.Tensor]:
        """A layer's fused matrices; their parts' digests are added to ``digests``."""
        matrices = []
        for matrix in layout.layer_matrices(self.config):
            names = [layout.layer_tensor(index, part) for part in matrix.parts]
            parts = [self.checkpoint.read(name) for name in names]
            if digests is not None:
                digests.update((name, sha256([part])) for name, part in zip(names, parts, strict=True))
            matrices.append(torch.cat(parts) if len(parts) > 1 else parts[0])
        return matrices

    def _head(self, index: int, chunk: layout.Chunk) -> dict[str, FileRecord]:
        """Both forms of a chunk of the output head."""
        weight = self.checkpoint.read(self.head, chunk.start, chunk.stop).contiguous()
        return self._both_forms(partial(layout.head_file, index), [weight], [self._head_importance], {})

    def _both_forms(
        self,
        name: Callable[[str], str],
        weights: Sequence[torch.Tensor],
        importance: Sequence[torch.Tensor | None],
        digests: dict[str, str],
    ) -> dict[str, FileRecord]:
        """A unit's exact or residual image, and its substitute; ``digests`` go with the first.

        ``importance``: what each weight's columns count (K,); None: all alike.

        Raises:
            StoreError: a residual does not give its weight back.
        """
        tiles = [quantize_tiles(*pair) for pair in zip(weights, importance, strict=True)]

        def residuals() -> list[torch.Tensor]:
            made = []
            for weight, own_tiles in zip(weights, tiles, strict=True):
                residual = encode(weight, own_tiles)
                if not _rebuilds(residual, own_tiles, weight):
                    raise StoreError(
                        f"{self.directory / name(self.form)} would not give back the checkpoint's weights: "
                        "prepare with --stream raw, and report this"
                    )
                made.append(residual)
            return images.join(made)

        first, second = name(self.form), name("substitute")
        record = self._write(first, weights if self.form == "exact" else residuals())
        return {first: replace(record, tensors=digests), second: self._write(second, tiles)}

    def _embedding(self) -> dict[str, FileRecord]:
        """The untied input embedding."""
        return {"embedding.exact": self._write("embedding.exact", self._rows(EMBEDDING))}

    def _rows(self, name: str) -> Iterator[torch.Tensor]:
        """A matrix in runs of rows."""
        for start in range(0, self.config.vocab_size, ROWS_A_READ):
            stop = min(start + ROWS_A_READ, self.config.vocab_size)
            yield self.checkpoint.read(name, start, stop).contiguous()

    def _small(self) -> dict[str, FileRecord]:
        """Norms and biases by their checkpoint names, the embedding rows' checksums, matrices' digests."""
        tensors = self._vectors()
        digests = {name: sha256([tensor]) for name, tensor in tensors.items()}
        if self.head != EMBEDDING:
            digests[self.head] = sha256(self._rows(self.head))
        sums: list[int] = []

        def summed() -> Iterator[torch.Tensor]:
            for rows in self._rows(EMBEDDING):
                sums.extend(zlib.crc32(row.data) for row in _bytes(rows).reshape(len(rows), -1))
                yield rows

        digests[EMBEDDING] = sha256(summed())
        tensors["embedding.crc32"] = torch.tensor(sums, dtype=torch.int64)
        content = np.frombuffer(bytearray(save(tensors)), dtype=np.uint8)
        name = "small.safetensors"
        record = self._write(name, [torch.from_numpy(content)], padded=False)
        return {name: replace(record, tensors=digests)}

    def _vectors(self) -> dict[str, torch.Tensor]:
        """Norms and biases by their checkpoint names."""
        names = [name for name, shape in self.config.tensors().items() if len(shape) == 1]
        return {name: self.checkpoint.read(name).contiguous() for name in names}

    def _tokenizer(self) -> dict[str, FileRecord]:
        """The tokenizer's files."""
        for name, content in self._tokenizer_files.items():
            path = self.directory / "tokenizer" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return {
            f"tokenizer/{name}": FileRecord(len(content), zlib.crc32(content))
            for name, content in self._tokenizer_files.items()
        }

    @cached_property
    def _activations(self) -> Activations | None:
        """The sample text before the first layer; None without a tokenizer."""
        rows = [self.checkpoint.read(EMBEDDING, token, token + 1) for token in self._sample_tokens()]
        if not rows:
            return None
        return Activations(self.config, self._vectors(), torch.cat(rows), self._matrices)

    @cached_property
    def _head_importance(self) -> torch.Tensor | None:
        """What the columns of the output head count."""
        return None if self._activations is None else self._activations.head()

    def _sample_tokens(self) -> list[int]:
        """The sample text's tokens; none where there is no tokenizer that can be loaded."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_buffer(self._tokenizer_files.get("tokenizer.json", b""))
        except Exception:  # noqa: BLE001 - the library raises no narrower one; drafts are a little worse then
            return []
        known = [token for token in tokenizer.encode(SAMPLE_TEXT).ids if token < self.config.vocab_size]
        return known[:MOST_TOKENS]

    @cached_property
    def _tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files by name; converting some takes seconds.  A checkpoint may have none."""
        with TemporaryDirectory() as place:
            self.checkpoint.export_tokenizer(Path(place))
            paths = sorted(path for path in Path(place).rglob("*") if path.is_file())
            return {str(path.relative_to(place)): path.read_bytes() for path in paths}

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


def sha256(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256, in hexadecimal, of contiguous tensors' bytes, one after another."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(_bytes(tensor).data)
    return found.hexdigest()


def _rebuilds(residual: torch.Tensor, tiles: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether residual and tiles give back the weight, bit for bit."""
    n, k = weight.shape
    bits = weight.view(torch.int16)
    for first in range(0, n, _COMPARED_ROWS):
        last = min(first + _COMPARED_ROWS, n)
        rows = torch.empty((last - first, k), dtype=weight.dtype)
        decode_rows(residual, tiles, n, rows, first)
        if not torch.equal(rows.view(torch.int16), bits[first:last]):
            return False
    return True
