"""Rows of the input embedding and of the output head, read when a token first needs them; a bounded cache.

A pass needs a few rows of tables that may be the largest tensors of the model: each costs one or two pages
of disk, or, of a head that is kept as residuals, the pages of sixteen rows' residuals and substitutes.  Every
embedding row is checked against its own checksum.  Of a head that is a table of its own, only drafts see
rows looked up here.
"""

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

import torch

from subspec.errors import StoreError
from subspec.memory.arena import Arena, map_bytes
from subspec.memory.disk import ImageFile, check_crc32, writable
from subspec.memory.tiers import PAGE_BYTES, page_aligned
from subspec.store.layout import head_chunks, head_file
from subspec.store.reader import Store
from subspec.substitute.layout import TILE_BYTES, TILE_ROWS, groups
from subspec.substitute.residual import TAIL_BYTES, decode_rows, directory_bytes

READERS = 4
_MOST_FIELD_BYTES = TILE_ROWS * (64 + 24 + 24)  # of a tile's payload
_MOST_TILE_BYTES = _MOST_FIELD_BYTES + 4 * TILE_ROWS * 64  # with every weight an escape


class RowSource(Protocol):
    """Reads one row."""

    span_bytes: int
    """Of the buffer that ``read`` needs, whole pages."""

    def read(self, token: int, buffer: torch.Tensor) -> torch.Tensor:
        """The row of a token: (row bytes,) uint8, a view of ``buffer`` or new."""
        ...

    def path(self, token: int) -> Path:
        """The file that holds the row."""
        ...


def _read_span(file: ImageFile, start: int, stop: int, buffer: torch.Tensor) -> torch.Tensor:
    """Bytes [start, stop) of a file: a view of ``buffer``, which has room for the pages around them."""
    first, last = start - start % PAGE_BYTES, page_aligned(stop)
    file.read(writable(buffer)[: last - first], first)
    return buffer[start - first : stop - first]


class ExactRows:
    """Rows of a table that lies in files as it is, some rows a file."""

    def __init__(self, files: list[ImageFile], rows_a_file: int, row_bytes: int) -> None:
        self._files, self._rows_a_file, self._row_bytes = files, rows_a_file, row_bytes
        self.span_bytes = page_aligned(row_bytes) + PAGE_BYTES

    def read(self, token: int, buffer: torch.Tensor) -> torch.Tensor:
        """One row, a view of ``buffer``."""
        start = (token % self._rows_a_file) * self._row_bytes
        return _read_span(self._files[token // self._rows_a_file], start, start + self._row_bytes, buffer)

    def path(self, token: int) -> Path:
        """The file that holds the row."""
        return self._files[token // self._rows_a_file].path


class RebuiltRows:
    """Rows of the output head, rebuilt from its chunks' residuals and substitutes."""

    def __init__(self, store: Store) -> None:
        self._k, self._dtype = store.config.hidden_size, store.dtype
        self._chunks = head_chunks(store.config, store.dtype.itemsize)
        self._residuals = [store.file(head_file(i, "residual")) for i in range(len(self._chunks))]
        self._tiles = [store.file(head_file(i, "substitute")) for i in range(len(self._chunks))]
        self.span_bytes = page_aligned(groups(self._k) * _MOST_TILE_BYTES) + 2 * PAGE_BYTES

    def read(self, token: int, buffer: torch.Tensor) -> torch.Tensor:
        """One row, new: the stripe of sixteen rows around it is rebuilt."""
        which = token // self._chunks[0].stop
        chunk, file, g = self._chunks[which], self._residuals[which], groups(self._k)
        row = token - chunk.start
        stripe = row // TILE_ROWS
        origin = int(_read_span(file, 0, 8, buffer).view(torch.int64))
        start = origin + 4 * stripe * g
        directory = _read_span(file, start, start + 4 * (g + 1), buffer).clone().view(torch.int32)
        payload = origin + directory_bytes(chunk.stop - chunk.start, self._k)
        sizes = directory.diff()
        if not 0 <= int(sizes.min()) <= int(sizes.max()) <= _MOST_TILE_BYTES:
            raise StoreError(
                f"{file.path} is damaged: the directory of rows {stripe * TILE_ROWS} and on is no directory; "
                f"prepare the model again with: subspec prepare MODEL --store {file.path.parent} --rebuild"
            )
        content = _read_span(file, payload + int(directory[0]), payload + int(directory[-1]), buffer)
        directory -= directory[0].clone()
        slack = torch.zeros(_MOST_FIELD_BYTES + TAIL_BYTES, dtype=torch.uint8)  # read by a damaged stripe
        residual = torch.cat([directory.view(torch.uint8), content, slack])
        tiles = _read_span(self._tiles[which], stripe * g * TILE_BYTES, (stripe + 1) * g * TILE_BYTES, buffer)
        rows = min(TILE_ROWS, chunk.stop - chunk.start - stripe * TILE_ROWS)
        out = torch.empty((rows, self._k), dtype=self._dtype)
        decode_rows(residual, tiles.clone(), rows, out)
        return out[row % TILE_ROWS].view(torch.uint8)

    def path(self, token: int) -> Path:
        """The file that holds the row's residual."""
        return self._residuals[token // self._chunks[0].stop].path


class EmbeddingRows:
    """Looks up rows of the input embedding and of the output head.

    Args:
        store: has the rows, in the head's chunks if embeddings are tied.
        checksums: (V,) CRC-32 of each row of the embedding.
        cache_rows: rows kept of both, least recently used out first.
        arena: where the cache lives.
    """

    def __init__(self, store: Store, checksums: torch.Tensor, cache_rows: int, arena: Arena) -> None:
        self._hidden = store.config.hidden_size
        self._dtype = store.dtype
        self._checksums = checksums
        self._cache = arena.tensor("embedding_cache", (cache_rows, self._hidden), store.dtype)
        self._place: OrderedDict[tuple[int, int], int] = OrderedDict()  # of a table's token
        head = _head_source(store)
        self._sources = [head] if store.config.tied_embeddings else [_table_source(store), head]
        span_bytes = max(source.span_bytes for source in self._sources)
        self._buffers = [map_bytes(span_bytes) for _ in range(READERS)]
        self._pool = ThreadPoolExecutor(READERS)

    def lookup(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        """Write the embeddings of tokens (T,) to ``out`` (T, C).

        Raises:
            StoreError: a row cannot be read, or is damaged.
        """
        self._lookup(0, tokens, out)

    def lookup_head(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        """Write the output head's rows of tokens (T,) to ``out`` (T, C).

        Raises:
            StoreError: a row cannot be read, or is known to be damaged.
        """
        self._lookup(len(self._sources) - 1, tokens, out)

    def cached(self, tokens: torch.Tensor, out: torch.Tensor, *, head: bool = False) -> torch.Tensor:
        """Write those rows of tokens (T,) that the cache has to ``out`` (T, C), and read nothing.

        Args:
            tokens: whose rows.
            out: rows that are not there stay as they are.
            head: of the output head, not of the embedding.

        Returns:
            (T,) bool: which are there.
        """
        table = len(self._sources) - 1 if head else 0
        places = [self._place.get((table, token)) for token in tokens.tolist()]
        there = torch.tensor([place is not None for place in places], dtype=torch.bool)
        out[there] = self._cache[[place for place in places if place is not None]]
        return there

    def close(self) -> None:
        """Stop the readers."""
        self._pool.shutdown()

    def _lookup(self, table: int, tokens: torch.Tensor, out: torch.Tensor) -> None:
        """Write rows of a table to ``out``: from the cache, or read at once by all readers."""
        missing: dict[int, list[int]] = {}
        for place, token in enumerate(tokens.tolist()):
            slot = self._place.get((table, token))
            if slot is None:
                missing.setdefault(token, []).append(place)
            else:
                self._place.move_to_end((table, token))
                out[place] = self._cache[slot]
        wanted = sorted(missing)
        if len(wanted) == 1:
            self._read_into(table, out, missing, wanted, 0)
        elif wanted:
            jobs = [
                self._pool.submit(self._read_into, table, out, missing, wanted[n::READERS], n)
                for n in range(READERS)
            ]
            wait(jobs)  # all of them, before any error: the buffers are the next call's
            for job in jobs:
                job.result()
        for token in wanted:
            self._keep((table, token), out[missing[token][0]])

    def _read_into(
        self, table: int, out: torch.Tensor, places: dict[int, list[int]], tokens: list[int], reader: int
    ) -> None:
        """Read some tokens' rows with one reader's buffer."""
        for token in tokens:
            row = self._read(table, token, self._buffers[reader])
            for place in places[token]:
                out[place] = row

    def _read(self, table: int, token: int, buffer: torch.Tensor) -> torch.Tensor:
        """One row (C,), an embedding's checked."""
        content = self._sources[table].read(token, buffer)
        if table == 0:
            expected, path = int(self._checksums[token]), self._sources[table].path(token)
            check_crc32(writable(content), expected, path, f"the embedding of token {token}")
        return content.view(self._dtype)

    def _keep(self, place: tuple[int, int], row: torch.Tensor) -> None:
        """Put a row into the cache, in place of the least recently used one if it is full."""
        if len(self._place) < self._cache.shape[0]:
            slot = len(self._place)
        else:
            _, slot = self._place.popitem(last=False)
        self._cache[slot] = row
        self._place[place] = slot


def _table_source(store: Store) -> RowSource:
    """Where a store has the rows of an input embedding that is a table of its own."""
    row_bytes = store.config.hidden_size * store.dtype.itemsize
    return ExactRows([store.file("embedding.exact")], store.config.vocab_size, row_bytes)


def _head_source(store: Store) -> RowSource:
    """Where a store has the rows of the output head."""
    if store.manifest.codec == "residual":
        return RebuiltRows(store)
    chunks = head_chunks(store.config, store.dtype.itemsize)
    files = [store.file(head_file(index, "exact")) for index in range(len(chunks))]
    return ExactRows(files, chunks[0].stop, store.config.hidden_size * store.dtype.itemsize)
