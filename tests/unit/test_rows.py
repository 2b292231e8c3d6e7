"""Embedding rows: the checkpoint's own, whatever the cache remembers, and never damaged ones."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_tiny

from subspec.errors import BudgetError, StoreError
from subspec.memory.arena import Arena
from subspec.memory.disk import ImageFile
from subspec.memory.tiers import MemoryBudget
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


@pytest.fixture(params=["tied", "untied"])
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A store and its embedding; rows of 100 bf16 numbers cross pages, and the head has several chunks."""
    changes: dict[str, Any] = {"hidden_size": 100, "tie_word_embeddings": request.param == "tied"}
    model = write_tiny(tmp_path / "model", "qwen2", torch.bfloat16, **changes)
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    return prepare(model, store=tmp_path / "store"), embedding


@pytest.mark.parametrize("cache_rows", [1, 3, CACHE_ROWS, VOCABULARY])
def test_rows_are_the_checkpoints_whatever_is_cached(
    prepared: tuple[Path, torch.Tensor], cache_rows: int
) -> None:
    store, embedding = prepared
    rng = random.Random(cache_rows)
    with opened(store, cache_rows) as rows:
        assert torch.equal(rows.lookup(range(VOCABULARY)), embedding)
        for _ in range(40):
            near = rng.randrange(VOCABULARY)
            tokens = [rng.choice([near, rng.randrange(VOCABULARY)]) for _ in range(rng.randint(0, 12))]
            found = rows.lookup(tokens)
            assert found.shape == (len(tokens), 100)
            assert torch.equal(found, embedding[tokens])
            found.fill_(7)  # the caller's own: it must not reach the cache


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
        expected = 0
        recent: list[int] = []  # least recently used first
        rng = random.Random(3)
        for _ in range(300):
            token = rng.randrange(9)
            expected += token not in recent
            recent = [*(other for other in recent if other != token), token][-CACHE_ROWS:]
            rows.lookup([token])
            assert reads == expected
        rows.lookup([100, 100, 101, 100])
        assert reads == expected + 2


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
    store, embedding = prepared
    damaged = 137
    names = json.loads((store / "manifest.json").read_text())["files"]
    name = "embedding.exact" if "embedding.exact" in names else None
    offset = damaged * 200 + 77
    if name is None:
        chunk = next(n for n in sorted(names) if n.startswith("head-") and n.endswith("exact"))
        rows_a_chunk = names[chunk]["n_bytes"] // 200
        assert rows_a_chunk > damaged or len([n for n in names if n.startswith("head")]) > 2
        offset, name = _place(store, embedding[damaged])
    path = store / name
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)
    with opened(store) as rows:
        others = [token for token in range(VOCABULARY) if token != damaged]
        assert torch.equal(rows.lookup(others), embedding[others])
        for tokens in ([damaged], [1, damaged, 2]):
            with pytest.raises(
                StoreError, match=rf"{name} is damaged: the embedding of token {damaged} .*--reb"
            ):
                rows.lookup(tokens)
        assert torch.equal(rows.lookup([damaged - 1, damaged + 1]), embedding[[damaged - 1, damaged + 1]])


def _place(store: Path, row: torch.Tensor) -> tuple[int, str]:
    """Where a row's bytes lie."""
    wanted = row.view(torch.uint8).numpy().tobytes()
    for path in sorted(store.glob("head-*.exact")):
        place = path.read_bytes().find(wanted)
        if place >= 0:
            return place, path.name
    raise AssertionError("the row is nowhere")


def test_a_row_that_cannot_be_read_is_an_error(prepared: tuple[Path, torch.Tensor]) -> None:
    store, _ = prepared
    with opened(store) as rows:
        for path in [*store.glob("embedding.exact"), *store.glob("head-*.exact")]:
            path.write_bytes(b"")
        with pytest.raises(StoreError, match=r"(embedding|head-\d+).exact ends at byte"):
            rows.lookup([3])
