"""Prove a store against its checkpoint: rebuild every tensor and compare its SHA-256."""

import contextlib
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from subspec.checkpoint import Checkpoint, open_checkpoint
from subspec.errors import SubspecError
from subspec.memory.disk import require_crc32
from subspec.store.exact import load_chunk, load_layer
from subspec.store.layout import head_chunks, layer_matrices, layer_tensor
from subspec.store.reader import Store
from subspec.store.writer import EMBEDDING, sha256

Progress = Callable[[str, int, int], None]
ROWS_A_READ = 4096


@dataclass(frozen=True)
class Finding:
    """One tensor of a store.

    Attributes:
        tensor: its name in the checkpoint.
        rebuilt: SHA-256 of what the store gives, in hexadecimal, or None if it gives nothing.
        expected: SHA-256 of the checkpoint's tensor: as it is now if ``source`` is ``checkpoint``, as it was
            when the store was prepared if ``source`` is ``manifest``.
        problem: why nothing was rebuilt.
    """

    tensor: str
    rebuilt: str | None
    expected: str
    source: str
    problem: str = ""

    @property
    def good(self) -> bool:
        """Whether the store gives the tensor's very bits."""
        return self.rebuilt == self.expected


def verify(directory: Path, progress: Progress | None = None) -> Iterator[Finding]:
    """Rebuild every tensor of a store, one finding each; damage in one does not stop the others.

    The checkpoint is read too where it is still what the store was prepared from.

    Raises:
        StoreError: the manifest or a tokenizer file is damaged, or a file is missing.
    """
    store = Store(directory)
    checkpoint = _checkpoint(store)
    expected = {
        name: digest for record in store.manifest.files.values() for name, digest in record.tensors.items()
    }
    done = 0
    try:
        for names, rebuilt in _tensors(store):
            digests: dict[str, str] = {}
            problem = ""
            try:
                digests = dict(zip(names, rebuilt(), strict=True))
            except (SubspecError, OSError) as error:
                problem = str(error)
            for name in names:
                wanted, source = expected[name], "manifest"
                if checkpoint is not None:
                    with contextlib.suppress(SubspecError):  # one that cannot be read any more is gone
                        wanted, source = _checkpoint_digest(checkpoint, name), "checkpoint"
                yield Finding(name, digests.get(name), wanted, source, problem)
                done += 1
                if progress is not None:
                    progress("verifying", done, len(expected))
    finally:
        store.close()
        if checkpoint is not None:
            checkpoint.close()


def _checkpoint(store: Store) -> Checkpoint | None:
    """The checkpoint, if it is still there and unchanged."""
    path = store.manifest.source.get("path")
    try:
        found = open_checkpoint(str(path), store.dtype)
    except SubspecError:
        return None
    if found.identity() == store.manifest.source:
        return found
    found.close()
    return None


def _checkpoint_digest(checkpoint: Checkpoint, name: str) -> str:
    """SHA-256 of a checkpoint's tensor in the store's dtype."""
    rows = checkpoint.tensors[name][0]
    return sha256(
        checkpoint.read(name, start, min(start + ROWS_A_READ, rows)).contiguous()
        for start in range(0, rows, ROWS_A_READ)
    )


def _tensors(store: Store) -> Iterator[tuple[list[str], Callable[[], list[str]]]]:
    """Tensors that are rebuilt together, and what gives their digests."""
    for index in range(store.config.layers):
        matrices = layer_matrices(store.config)
        names = [layer_tensor(index, part) for matrix in matrices for part in matrix.parts]
        yield names, partial(_layer_digests, store, index)
    tied = store.config.tied_embeddings
    yield [EMBEDDING if tied else "lm_head.weight"], lambda: [sha256(_head(store))]
    if not tied:
        yield [EMBEDDING], lambda: [_embedding_digest(store)]
    vectors = [name for name, shape in store.config.tensors().items() if len(shape) == 1]
    yield vectors, lambda: [sha256([tensor]) for tensor in _vectors(store, vectors)]


def _layer_digests(store: Store, index: int) -> list[str]:
    """Of each tensor of a layer: fused matrices are cut into their parts again."""
    shapes = store.config.tensors()
    digests = []
    matrices = layer_matrices(store.config)
    for matrix, weight in zip(matrices, load_layer(store, index), strict=True):
        rows = [shapes[layer_tensor(index, part)][0] for part in matrix.parts]
        digests += [sha256([part.contiguous()]) for part in torch.split(weight, rows)]
    return digests


def _head(store: Store) -> Iterator[Tensor]:
    """The output head, chunk by chunk."""
    for index in range(len(head_chunks(store.config, store.dtype.itemsize))):
        yield load_chunk(store, index)


def _embedding_digest(store: Store) -> str:
    """Of the untied input embedding, without the file's padding."""
    record, path = store.manifest.files["embedding.exact"], store.directory / "embedding.exact"
    left = store.config.vocab_size * store.config.hidden_size * store.dtype.itemsize
    found, crc32 = hashlib.sha256(), 0
    with path.open("rb") as file:
        while content := file.read(1 << 24):
            crc32 = zlib.crc32(content, crc32)
            found.update(content[:left])
            left -= min(left, len(content))
    require_crc32(crc32, record.crc32, path)
    return found.hexdigest()


def _vectors(store: Store, names: Iterable[str]) -> list[Tensor]:
    """Norms and biases."""
    tensors = store.small_tensors()
    return [tensors[name] for name in names]
