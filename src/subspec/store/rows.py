"""Embedding rows, read when a token first needs them, with a bounded cache.

A pass needs a few rows of a table that may be the largest tensor of the model: each costs one or two pages
of disk. Every row is checked against its own checksum.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from subspec.memory.arena import Arena, map_bytes
from subspec.memory.disk import ImageFile, check_crc32, writable
from subspec.memory.tiers import PAGE_BYTES, page_aligned
from subspec.store.layout import head_chunks, head_file
from subspec.store.reader import Store

READERS = 4


class EmbeddingRows:
    """Looks up rows of the input embedding.

    Args:
        store: has the rows, in the head's chunks if embeddings are tied.
        checksums: (V,) CRC-32 of each row.
        cache_rows: rows kept, least recently used out first.
        arena: where the cache lives.
    """

    def __init__(self, store: Store, checksums: torch.Tensor, cache_rows: int, arena: Arena) -> None:
        self._hidden = store.config.hidden_size
        self._dtype = store.dtype
        self._row_bytes = self._hidden * store.dtype.itemsize
        self._checksums = checksums
        self._cache = arena.tensor("embedding_cache", (cache_rows, self._hidden), store.dtype)
        self._place: OrderedDict[int, int] = OrderedDict()
        if store.config.tied_embeddings:
            chunks = head_chunks(store.config, store.dtype.itemsize)
            self._files = [store.file(head_file(index, "exact")) for index in range(len(chunks))]
            self._rows_a_file = chunks[0].stop
        else:
            self._files = [store.file("embedding.exact")]
            self._rows_a_file = store.config.vocab_size
        span = page_aligned(self._row_bytes) + PAGE_BYTES
        self._buffers = [map_bytes(span) for _ in range(READERS)]
        self._pool = ThreadPoolExecutor(READERS)

    def lookup(self, tokens: Sequence[int]) -> torch.Tensor:
        """The tokens' embeddings, (T, C).

        Raises:
            StoreError: a row cannot be read, or is damaged.
        """
        out = torch.empty((len(tokens), self._hidden), dtype=self._dtype)
        missing: dict[int, list[int]] = {}
        for place, token in enumerate(tokens):
            slot = self._place.get(token)
            if slot is None:
                missing.setdefault(token, []).append(place)
            else:
                self._place.move_to_end(token)
                out[place] = self._cache[slot]
        wanted = sorted(missing)
        if len(wanted) == 1:
            self._read_into(out, missing, wanted, 0)
        elif wanted:
            jobs = [
                self._pool.submit(self._read_into, out, missing, wanted[n::READERS], n)
                for n in range(READERS)
            ]
            wait(jobs)  # all of them, before any error: the buffers are the next call's
            for job in jobs:
                job.result()
        for token in wanted:
            self._keep(token, out[missing[token][0]])
        return out

    def close(self) -> None:
        """Stop the readers."""
        self._pool.shutdown()

    def _read_into(
        self, out: torch.Tensor, places: dict[int, list[int]], tokens: list[int], reader: int
    ) -> None:
        """Read some tokens' rows with one reader's buffer."""
        buffer = self._buffers[reader]
        for token in tokens:
            file = self._files[token // self._rows_a_file]
            row = self._read(file, token, (token % self._rows_a_file) * self._row_bytes, buffer)
            for place in places[token]:
                out[place] = row

    def _read(self, file: ImageFile, token: int, offset: int, buffer: torch.Tensor) -> torch.Tensor:
        """One row, a view (C,) of ``buffer``."""
        first = offset - offset % PAGE_BYTES
        last = page_aligned(offset + self._row_bytes)
        file.read(writable(buffer)[: last - first], first)
        content = buffer[offset - first : offset - first + self._row_bytes]
        expected = int(self._checksums[token])
        check_crc32(writable(content), expected, file.path, f"the embedding of token {token}")
        return content.view(self._dtype)

    def _keep(self, token: int, row: torch.Tensor) -> None:
        """Put a row into the cache, in place of the least recently used one if it is full."""
        if len(self._place) < self._cache.shape[0]:
            slot = len(self._place)
        else:
            _, slot = self._place.popitem(last=False)
        self._cache[slot] = row
        self._place[token] = slot
