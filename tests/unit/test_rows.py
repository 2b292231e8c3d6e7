"""Embedding rows: the checkpoint's own, whatever the cache remembers, and never damaged ones."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import write_tiny

from subspec.errors import BudgetError, StoreError
from subspec.memory.arena import Arena
from subspec.memory.disk import ImageFile
from subspec.memory.tiers import MemoryBudget
from subspec.store.layout import head_chunks
from subspec.store.prepare import prepare
from subspec.store.reader import Store
from subspec.store.rows import EmbeddingRows

CACHE_ROWS = 5
VOCABULARY = 320


@contextmanager
def opened(store: Path, cache_rows: int = CACHE_ROWS) -> Iterator[EmbeddingRows]:
    found = Store(store)
    rows = EmbeddingRows(
        found, found.small_tensors()["embedding.crc32"], cache_rows, Arena(MemoryBudget(1 << 20))
    )
    try:
        yield rows
    finally:
        rows.close()
        found.close()


def looked_up(rows: EmbeddingRows, tokens: Sequence[int]) -> torch.Tensor:
    out = torch.full((len(tokens), 100), torch.nan, dtype=torch.bfloat16)
    rows.lookup(torch.tensor(tokens, dtype=torch.int64), out)
    return out


@pytest.fixture(params=["tied", "untied"])
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A store and its embedding; rows of 100 bf16 numbers cross pages, and the head has several chunks."""
    changes: dict[str, Any] = {"hidden_size": 100, "tie_word_embeddings": request.param == "tied"}
    model = write_tiny(tmp_path / "model", "qwen2", torch.bfloat16, **changes)
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    return prepare(model, store=tmp_path / "store"), embedding


def test_what_is_cached_is_there_without_a_read(prepared: tuple[Path, torch.Tensor]) -> None:
    store, embedding = prepared
    with opened(store) as rows:
        looked_up(rows, [7, 9])
        out = torch.zeros(3, 100, dtype=torch.bfloat16)
        there = rows.cached(torch.tensor([9, 8, 7]), out)
        assert there.tolist() == [True, False, True]
        assert torch.equal(out[[0, 2]], embedding[[9, 7]])
        assert not out[1].any()
        tied = not (store / "embedding.exact").exists()
        assert rows.cached(torch.tensor([9]), out[:1], head=True).tolist() == [tied], "another table's row"


@pytest.mark.parametrize("cache_rows", [1, 3, CACHE_ROWS, VOCABULARY])
def test_rows_are_the_checkpoints_whatever_is_cached(
    prepared: tuple[Path, torch.Tensor], cache_rows: int
) -> None:
    store, embedding = prepared
    rng = random.Random(cache_rows)
    with opened(store, cache_rows) as rows:
        assert torch.equal(looked_up(rows, range(VOCABULARY)), embedding)
        for _ in range(40):
            near = rng.randrange(VOCABULARY)
            tokens = [rng.choice([near, rng.randrange(VOCABULARY)]) for _ in range(rng.randint(0, 12))]
            found = looked_up(rows, tokens)
            assert found.shape == (len(tokens), 100)
            assert torch.equal(found, embedding[tokens])
            found.fill_(7)  # the caller's own: it must not reach the cache


@pytest.mark.parametrize("form", ["residual", "raw"])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_the_head_and_the_embedding_do_not_mix(tmp_path: Path, form: str, tied: bool) -> None:
    """Both tables share a cache that holds a few rows of them."""
    model = write_tiny(tmp_path / "model", "qwen2", torch.bfloat16, hidden_size=100, tie_word_embeddings=tied)
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding if tied else tensors["lm_head.weight"]
    rng = random.Random(5)
    with opened(prepare(model, store=tmp_path / "store", stream=form)) as rows:
        for _ in range(60):
            tokens = [rng.randrange(9) for _ in range(rng.randint(0, 4))]
            assert torch.equal(looked_up(rows, tokens), embedding[tokens])
            out = torch.full((len(tokens), 100), torch.nan, dtype=torch.bfloat16)
            rows.lookup_head(torch.tensor(tokens, dtype=torch.int64), out)
            assert torch.equal(out, head[tokens])


def test_recent_rows_are_not_read_again_and_the_oldest_go_first(
    prepared: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, real = 0, ImageFile.read

    def counted(self: ImageFile, target: memoryview, offset: int) -> None:
        nonlocal reads
        reads += 1
        real(self, target, offset)

    with opened(prepared[0]) as rows:
        monkeypatch.setattr(ImageFile, "read", counted)
        looked_up(rows, [200])
        reads_a_row, reads, expected = reads, 0, 0
        recent: list[int] = []  # least recently used first
        rng = random.Random(3)
        for _ in range(300):
            token = rng.randrange(9)
            expected += token not in recent
            recent = [*(other for other in recent if other != token), token][-CACHE_ROWS:]
            looked_up(rows, [token])
            assert reads == expected * reads_a_row
        looked_up(rows, [100, 100, 101, 100])
        assert reads == (expected + 2) * reads_a_row


def test_the_cache_is_within_the_budget(prepared: tuple[Path, torch.Tensor]) -> None:
    store = Store(prepared[0])
    checksums = store.small_tensors()["embedding.crc32"]
    budget = MemoryBudget(8192)
    EmbeddingRows(store, checksums, 40, Arena(budget)).close()
    assert budget.held_bytes == 8192
    with pytest.raises(BudgetError):
        EmbeddingRows(store, checksums, 41, Arena(MemoryBudget(8192)))
    store.close()


def test_a_damaged_row_is_refused_and_its_neighbours_are_not(prepared: tuple[Path, torch.Tensor]) -> None:
    """Neighbours are all rows but those whose bytes are read and rebuilt together with the damaged one's."""
    store, embedding = prepared
    damaged = 137
    path, offset, together = _place(store, damaged)
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)
    with opened(store) as rows:
        others = [token for token in range(VOCABULARY) if token not in together]
        assert torch.equal(looked_up(rows, others), embedding[others])
        for tokens in ([damaged], [1, damaged, 2]):
            with pytest.raises(
                StoreError, match=rf"{path.name} is damaged: the embedding of token {damaged} .*--reb"
            ):
                looked_up(rows, tokens)
        assert torch.equal(looked_up(rows, [others[0], others[-1]]), embedding[[others[0], others[-1]]])


def _place(store: Path, token: int) -> tuple[Path, int, range]:
    """A file and a byte of it that a row of 100 weights depends on; the rows that may depend on it too."""
    if (store / "embedding.exact").exists():
        return store / "embedding.exact", token * 200 + 77, range(token, token + 1)
    opened_store = Store(store)
    chunks = head_chunks(opened_store.config, 2)
    opened_store.close()
    index = next(i for i, chunk in enumerate(chunks) if chunk.start <= token < chunk.stop)
    row = token - chunks[index].start
    path = store / f"head-{index:04d}.residual"
    start = int.from_bytes(path.read_bytes()[:8], "little")
    directory = np.frombuffer(path.read_bytes(), "<u4", offset=start, count=2 * (row // 16) + 1)
    payload = start + 4 * (2 * -(-(chunks[index].stop - chunks[index].start) // 16) + 1)
    first = chunks[index].start + row // 16 * 16
    # About in the middle of the row's share of the tile's payload.
    tile = payload + int(directory[-1])
    return path, tile + int((row % 16 + 0.5) * 62), range(first, first + 16)


@pytest.mark.parametrize("entry", [-1, 0, 1, 2])
def test_a_damaged_directory_is_refused(tmp_path: Path, entry: int) -> None:
    """The offsets that lead to a row: whatever they become, an error says so, and nothing crashes."""
    changes: dict[str, Any] = {"hidden_size": 100, "tie_word_embeddings": True}
    store = prepare(
        write_tiny(tmp_path / "model", "qwen2", torch.bfloat16, **changes), store=tmp_path / "store"
    )
    path = store / "head-0000.residual"
    good = path.read_bytes()
    place = 0 if entry < 0 else int.from_bytes(good[:8], "little") + 4 * entry
    for value in (0, 1, 12345, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        written = value.to_bytes(4, "little")
        if good[place : place + 4] == written:
            continue
        path.write_bytes(good[:place] + written + good[place + 4 :])
        with opened(store) as rows, pytest.raises(StoreError, match=path.name):
            looked_up(rows, [3])


def test_a_row_that_cannot_be_read_is_an_error(prepared: tuple[Path, torch.Tensor]) -> None:
    store, _ = prepared
    with opened(store) as rows:
        for path in [*store.glob("embedding.exact"), *store.glob("head-*.residual")]:
            path.write_bytes(b"")
        with pytest.raises(StoreError, match=r"(embedding|head-\d+).(exact|residual) ends at byte"):
            looked_up(rows, [3])
