"""In which form a store keeps exact weights: who decides, and what becomes of stores in another form."""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny

from subspec.errors import OptionError, StoreError
from subspec.kernels.native import Kernels
from subspec.memory.disk import cache_directory
from subspec.store import prepare as prepare_module
from subspec.store import writer as writer_module
from subspec.store.manifest import FILE_NAME, Manifest
from subspec.store.prepare import prepare
from subspec.substitute import residual


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", "qwen2", torch.bfloat16)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def forms(store: Path) -> set[str]:
    return {path.suffix for path in store.glob("layer-*")}


def changed_manifest(store: Path, **changes: Any) -> None:
    """Rewrite a store's manifest, sealed."""
    data = {**json.loads((store / FILE_NAME).read_text()), **changes}
    del data["crc32"]
    data["crc32"] = zlib.crc32(json.dumps(data, sort_keys=True).encode())
    (store / FILE_NAME).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("dtype", "stream", "codec"),
    [
        ("bfloat16", None, "residual"),
        ("float16", None, "residual"),
        ("float32", None, "raw"),
        ("bfloat16", "raw", "raw"),
        ("float32", "raw", "raw"),
        ("float16", "residual", "residual"),
    ],
)
def test_the_dtype_decides_unless_the_user_does(
    model: Path, store: Path, dtype: str, stream: str | None, codec: str
) -> None:
    prepare(model, store=store, dtype=dtype, stream=stream)
    assert Manifest.read(store).codec == codec
    assert forms(store) == {".substitute", ".residual" if codec == "residual" else ".exact"}


def test_fp32_has_no_residual_form(model: Path, store: Path) -> None:
    with pytest.raises(OptionError, match="--stream residual: fp32 weights have no residual form"):
        prepare(model, store=store, dtype="float32", stream="residual")
    with pytest.raises(OptionError, match="--stream zip: choose one of residual, raw"):
        prepare(model, store=store, stream="zip")
    assert not store.exists()


def test_without_native_kernels_weights_are_kept_raw(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "kernels", lambda: Kernels("reference", None, {}))
    prepare(model, store=store)
    assert Manifest.read(store).codec == "raw"
    prepare(model, store=store, stream="residual", rebuild=True)
    assert Manifest.read(store).codec == "residual"


def test_a_store_stays_in_its_form_until_another_is_asked_for(model: Path, store: Path) -> None:
    prepare(model, store=store, stream="raw")
    prepare(model, store=store)
    prepare(model, store=store, rebuild=True)
    assert Manifest.read(store).codec == "raw"
    with pytest.raises(OptionError, match="was prepared to stream raw: .* --stream residual --rebuild"):
        prepare(model, store=store, stream="residual")
    assert forms(store) == {".substitute", ".exact"}
    prepare(model, store=store, stream="residual", rebuild=True)
    assert forms(store) == {".substitute", ".residual"}
    prepare(model, store=store)
    assert Manifest.read(store).codec == "residual"
    with pytest.raises(OptionError, match="was prepared to stream residual: .* --stream raw"):
        prepare(store, stream="raw")
    assert prepare(store, stream="residual") == store


def test_both_forms_have_places_of_their_own(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    residual, raw = prepare(model), prepare(model, stream="raw")
    assert residual != raw
    assert {residual.parent, raw.parent} == {cache_directory() / "stores"}
    assert (prepare(model), prepare(model, stream="raw")) == (residual, raw)
    assert prepare(model, dtype="float32") == prepare(model, dtype="float32", stream="raw")


def test_a_store_of_the_earlier_format_is_rebuilt(model: Path, store: Path) -> None:
    prepare(model, store=store, stream="raw")
    data = json.loads((store / FILE_NAME).read_text())
    for record in data["files"].values():
        del record["tensors"]
    changed_manifest(store, version=1, files=data["files"])
    with pytest.raises(StoreError, match="format version 1, codec raw, .* prepare the model again"):
        Manifest.read(store)
    with pytest.raises(StoreError, match="format version 1"):
        prepare(store)
    prepare(model, store=store)
    assert Manifest.read(store).version == 2
    assert forms(store) == {".substitute", ".residual"}


def test_a_residual_that_does_not_rebuild_its_weight_is_never_named(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = residual.encode

    def damaged(weight: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        made = real(weight, tiles)
        made[len(made) // 2] ^= 1
        return made

    monkeypatch.setattr(writer_module, "encode", damaged)
    with pytest.raises(StoreError, match=r"layer-0000\.residual would not give back .* --stream raw"):
        prepare(model, store=store)
    assert not (store / FILE_NAME).exists()
    assert not list(store.glob("*.residual"))
    monkeypatch.undo()
    prepare(model, store=store)


def test_a_broken_off_raw_store_goes_on_as_raw(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(writer_module.StoreWriter, "_small", stop)
        with pytest.raises(StoreError, match="cannot be written"):
            prepare(model, store=store, stream="raw")
    before = {path.name: path.stat().st_ino for path in store.glob("layer-*")}
    prepare(model, store=store)
    assert Manifest.read(store).codec == "raw"
    assert {path.name: path.stat().st_ino for path in store.glob("layer-*")} == before


def test_a_directory_that_is_refused_is_left_as_it_was(model: Path, store: Path) -> None:
    store.mkdir()
    (store / "thing").touch()
    with pytest.raises(StoreError, match="is not empty and holds no readable store"):
        prepare(model, store=store)
    assert [path.name for path in store.iterdir()] == ["thing"]
