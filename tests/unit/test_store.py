"""An open store: what it says of itself, and what it refuses.  Its bytes are the checkpoint's."""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILIES, write_tiny

from subspec.errors import StoreError
from subspec.memory.arena import map_bytes
from subspec.memory.tiers import PAGE_BYTES, page_aligned
from subspec.models.config import ModelConfig
from subspec.store.layout import head_chunks, head_file, layer_file, layer_matrices
from subspec.store.manifest import FILE_NAME, Manifest, is_store
from subspec.store.prepare import prepare, store_bytes
from subspec.store.reader import Store
from subspec.substitute.layout import tile_bytes
from subspec.substitute.quantize import quantize_tiles

LAYER_PARTS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


def loaded(store: Store, name: str) -> torch.Tensor:
    record = store.manifest.files[name]
    memory = map_bytes(page_aligned(record.n_bytes))
    store.load(name, memory)
    return memory[: record.n_bytes]


def as_bytes(tensors: list[torch.Tensor]) -> bytes:
    return b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "tied"), [(torch.bfloat16, True), (torch.float32, False), (torch.float16, False)]
)
def test_the_bytes_are_the_checkpoints(tmp_path: Path, family: str, dtype: torch.dtype, tied: bool) -> None:
    model = write_tiny(tmp_path / "model", family, dtype, tie_word_embeddings=tied, vocab_size=333)
    weights = load_file(model / "model.safetensors")
    store = Store(prepare(model, store=tmp_path / "store", stream="raw"))
    assert store.dtype == dtype
    for index in range(store.config.layers):
        fused = [
            torch.cat([weights[f"model.layers.{index}.{part}.weight"] for part in parts])
            for parts in LAYER_PARTS
        ]
        exact = loaded(store, layer_file(index, "exact")).numpy().tobytes()
        expected = as_bytes(fused)
        assert exact[: len(expected)] == expected
        assert not any(exact[len(expected) :])
        tiles = loaded(store, layer_file(index, "substitute")).numpy().tobytes()
        expected = as_bytes([quantize_tiles(weight) for weight in fused])
        assert tiles[: len(expected)] == expected
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    for index, chunk in enumerate(head_chunks(store.config, dtype.itemsize)):
        part = head[chunk.start : chunk.stop]
        assert loaded(store, head_file(index, "exact")).numpy().tobytes().startswith(as_bytes([part]))
        tiles = loaded(store, head_file(index, "substitute")).numpy().tobytes()
        assert tiles.startswith(as_bytes([quantize_tiles(part)]))
    if not tied:
        embedding = loaded(store, "embedding.exact").numpy().tobytes()
        assert embedding.startswith(as_bytes([weights["model.embed_tokens.weight"]]))
    small = store.small_tensors()
    assert len(small.pop("embedding.crc32")) == 333
    assert {name: len(value.shape) for name, value in small.items()} == dict.fromkeys(small, 1)
    assert set(small) == {name for name, weight in weights.items() if weight.dim() == 1}
    assert all(torch.equal(value, weights[name]) for name, value in small.items())
    store.close()


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 333, 5000])
@pytest.mark.parametrize("hidden", [16, 64, 100])
def test_the_layout_covers_everything_once(vocabulary: int, hidden: int) -> None:
    from tiny import tiny_config

    config = ModelConfig.from_dict(
        tiny_config("qwen2", vocab_size=vocabulary, hidden_size=hidden, eos_token_id=0, bos_token_id=0)
    )
    for itemsize in (2, 4):
        chunks = head_chunks(config, itemsize)
        assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
        assert chunks[-1].stop == vocabulary
        assert all(chunk.start < chunk.stop for chunk in chunks)
        assert len({chunk.stop - chunk.start for chunk in chunks[:-1]}) <= 1
        assert all(chunk.start % 16 == 0 for chunk in chunks)  # a substitute's tiles are 16 rows high
        tiles = 0
        for matrix in layer_matrices(config):
            assert matrix.substitute_offset == tiles
            tiles += tile_bytes(matrix.n, matrix.k)


def test_the_announced_size_is_that_of_the_images(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", "llama", torch.bfloat16)
    store = Store(prepare(model, store=tmp_path / "store", stream="raw"))
    images = [path for path in store.directory.iterdir() if path.suffix in (".exact", ".substitute")]
    assert all(path.stat().st_size % PAGE_BYTES == 0 for path in images)
    announced = store_bytes(store.config, store.dtype.itemsize, "raw")
    assert announced == sum(path.stat().st_size for path in images)
    streamed = {path.name for path in images if path.suffix == ".exact" and "embedding" not in path.name}
    assert {path.name for path in store.images()} == streamed
    store.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_images_are_smaller_than_announced(tmp_path: Path, dtype: torch.dtype) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 704, "vocab_size": 2000}
    model = write_tiny(tmp_path / "model", "llama", dtype, **sizes)
    store = Store(prepare(model, store=tmp_path / "store"))
    assert store.form == "residual"
    images = [path for path in store.directory.iterdir() if path.suffix in (".residual", ".substitute")]
    images.append(store.directory / "embedding.exact")
    assert all(path.stat().st_size % PAGE_BYTES == 0 for path in images)
    stored = sum(path.stat().st_size for path in images)
    assert stored <= store_bytes(store.config, store.dtype.itemsize, "residual")
    assert stored < store_bytes(store.config, store.dtype.itemsize, "raw")
    store.close()


def test_units_are_whole_files(prepared: Path) -> None:
    store = Store(prepared)
    unit = store.unit(layer_file(1, store.form))
    assert unit.n_bytes == unit.file.n_bytes == (prepared / unit.name).stat().st_size
    assert store.file(unit.name) is unit.file
    assert store.direct in (True, False)
    store.close()


def test_a_manifest_comes_back_as_it_was_written(prepared: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(prepared)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert is_store(prepared)
    assert not is_store(tmp_path / "nowhere")


def edit(store: Path, **changes: Any) -> None:
    """Change the manifest and seal it again."""
    data = {**json.loads((store / FILE_NAME).read_text()), **changes}
    del data["crc32"]
    seal = zlib.crc32(json.dumps(data, sort_keys=True).encode())
    (store / FILE_NAME).write_text(json.dumps({**data, "crc32": seal}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 99}, "format version 99, codec residual, .*; this subspec reads format version 2, "),
        ({"version": 1, "codec": "raw"}, "format version 1, codec raw, .*; .*: prepare the model again"),
        (
            {"codec": "zip"},
            "codec zip, .*; this subspec reads format version 2, codec residual or raw, .*: prepare the",
        ),
        ({"format": "else"}, "manifest.json is not a manifest of a subspec store"),
        ({"dtype": "int3"}, "manifest.json is damaged .*int3.*: prepare the model again"),
        ({"files": 3}, "manifest.json is damaged"),
        ({"files": {"a": {"n_bytes": 3}}}, "manifest.json is damaged"),
        ({"surplus": 1}, "manifest.json is damaged .*surplus"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(prepared: Path, changes: dict[str, Any], message: str) -> None:
    edit(prepared, **changes)
    with pytest.raises(StoreError, match=message):
        Store(prepared)


@pytest.mark.parametrize("changes", [{"bits": 3}, {"group": 32}])
def test_substitutes_of_another_kind_are_refused(prepared: Path, changes: dict[str, Any]) -> None:
    edit(prepared, **changes)
    with pytest.raises(StoreError):
        Store(prepared)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00\x01", '{"format": "subspec-store"'])
def test_a_broken_manifest_is_refused(prepared: Path, content: str) -> None:
    (prepared / FILE_NAME).write_text(content)
    with pytest.raises(StoreError, match=r"manifest\.json is (damaged|not a manifest)"):
        Store(prepared)
    assert not is_store(prepared)


def test_a_directory_without_a_manifest_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no prepared model"):
        Store(tmp_path)


def test_a_missing_or_shorter_or_longer_file_is_named(prepared: Path) -> None:
    for name in Manifest.read(prepared).files:
        content = (prepared / name).read_bytes()
        for other, state in [
            (None, "is missing"),
            (content[:-1], f"has {len(content) - 1} bytes instead of {len(content)}"),
            (content + b"x", f"has {len(content) + 1} bytes"),
            (b"", "has 0 bytes"),
        ]:
            (prepared / name).unlink() if other is None else (prepared / name).write_bytes(other)
            with pytest.raises(StoreError, match=f"{name} {state}.*: prepare the model again"):
                Store(prepared)
        (prepared / name).write_bytes(content)
    Store(prepared).close()


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    model = write_tiny(tmp_path / "model", "qwen3", torch.bfloat16)
    return prepare(model, store=tmp_path / "store")
