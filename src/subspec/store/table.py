"""The exact input embedding as one table in host memory, whose rows a device gathers.

Beside a device the host does not know which tokens a pass is for, so that it cannot look them up: the device
does, over the bus.  Knows nothing of how the rows are used.
"""

import torch

from subspec.kernels import device
from subspec.memory.arena import Arena
from subspec.store.exact import load_chunk
from subspec.store.layout import head_chunks
from subspec.store.reader import Store


class EmbeddingTable:
    """All rows of the input embedding.

    Args:
        store: has the rows, in the head's chunks if embeddings are tied.
        arena: pinned host memory.

    Raises:
        StoreError: an image is damaged or cannot be read.
    """

    def __init__(self, store: Store, arena: Arena) -> None:
        shape, itemsize = (store.config.vocab_size, store.config.hidden_size), store.dtype.itemsize
        memory = arena.bytes("embedding", shape[0] * shape[1] * itemsize)
        self.rows = memory[: shape[0] * shape[1] * itemsize].view(store.dtype).view(shape)
        if not store.config.tied_embeddings:
            store.load("embedding.exact", memory)
            return
        for index, chunk in enumerate(head_chunks(store.config, itemsize)):
            self.rows[chunk.start : chunk.stop] = load_chunk(store, index)

    def lookup(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        """Write the embeddings of tokens (T,) to ``out`` (T, C), both on the device; does not synchronize."""
        if out.device.type == "cpu":
            torch.index_select(self.rows, 0, tokens, out=out)
        else:
            out.copy_(device.gather_rows(self.rows, tokens))

    def close(self) -> None:
        """Nothing to stop: the memory is the arena's."""
