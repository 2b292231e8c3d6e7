"""From a checkpoint to a store: once, whole, and only where it may."""

import contextlib
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import add_letters, tiny_config, write_tiny

from subspec import LLM, SamplingParams
from subspec.errors import OptionError, StoreError
from subspec.memory.disk import cache_directory
from subspec.store.manifest import FILE_NAME, Manifest
from subspec.store.prepare import prepare
from subspec.store.reader import Store

PARAMS = SamplingParams(max_new_tokens=5, ignore_eos=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", "qwen2", torch.bfloat16)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def contents(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def times(store: Path) -> dict[str, tuple[int, int]]:
    """What tells a file from one written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in store.iterdir()}


def answer(store: Path) -> list[int]:
    with LLM(store, "16MiB") as llm:
        return llm.generate([5, 6], PARAMS).token_ids


def test_a_store_is_made_once(model: Path, store: Path) -> None:
    assert prepare(model, store=store) == store
    before = times(store)
    assert prepare(model, store=store) == store
    after = times(store)
    before.pop(".lock")
    after.pop(".lock")
    assert after == before


def test_two_stores_of_one_model_are_equal_byte_for_byte(model: Path, tmp_path: Path) -> None:
    first, second = (contents(prepare(model, store=tmp_path / name)) for name in "ab")
    assert first == second


def test_nothing_is_left_beside_the_files_that_the_manifest_names(model: Path, store: Path) -> None:
    prepare(model, store=store)
    assert set(contents(store)) - {".lock"} == {*Manifest.read(store).files, FILE_NAME}


def test_rebuilding_writes_every_file_anew(model: Path, store: Path) -> None:
    prepare(model, store=store)
    before, content = times(store), contents(store)
    prepare(model, store=store, rebuild=True)
    assert contents(store) == content
    for name, state in times(store).items():
        assert name in (".lock", "tokenizer") or state != before[name]


def test_the_default_place_follows_the_cache_convention(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_directory() == tmp_path / "cache" / "subspec"
    first = prepare(model)
    assert first.is_relative_to(tmp_path / "cache" / "subspec")
    assert "model" in first.name
    assert prepare(model) == first
    second = prepare(model, dtype="float32")
    assert second != first
    assert Manifest.read(second).dtype == "float32"
    other = write_tiny(tmp_path / "elsewhere" / "model", "qwen2")
    assert prepare(other) not in (first, second)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "home" / ".cache" / "subspec"


def test_progress_rises_to_its_end(model: Path, store: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    prepare(model, store=store, progress=lambda *state: seen.append(state))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert len({total for *_, total in seen}) == 1
    assert seen[-1][1] >= seen[-1][2]


def test_progress_never_exceeds_its_end(model: Path, store: Path) -> None:
    seen: list[tuple[int, int]] = []
    prepare(model, store=store, progress=lambda _, done, total: seen.append((done, total)))
    assert all(done <= total for done, total in seen)


# Stale


def replace_weights(model: Path) -> None:
    write_tiny(model, "qwen2", torch.bfloat16, seed=1)


def touch(model: Path) -> None:
    os.utime(model / "model.safetensors", ns=(1, 1))


def change_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))


def change_dtype(model: Path) -> None:
    write_tiny(model, "qwen2", torch.float32)


def change_size(model: Path) -> None:
    write_tiny(model, "qwen2", torch.bfloat16, num_hidden_layers=2)


def change_in_place(model: Path) -> None:
    """Another header in a file of the same size and time."""
    path = model / "model.safetensors"
    state, content = path.stat(), path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    turned = dict(reversed(json.loads(content[8 : 8 + size]).items()))
    header = json.dumps(turned, separators=(",", ":")).encode().ljust(size)
    assert len(header) == size
    path.write_bytes(content[:8] + header + content[8 + size :])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


STALE = [replace_weights, touch, change_config, change_dtype, change_size, change_in_place]


@pytest.mark.parametrize("change", STALE)
def test_a_stale_store_is_rebuilt(
    model: Path, store: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    prepare(model, store=store)
    before = times(store)
    change(model)
    prepare(model, store=store)
    assert times(store)["layer-0000.substitute"] != before["layer-0000.substitute"]
    assert contents(store) == contents(prepare(model, store=tmp_path / "fresh"))


def test_another_dtype_rebuilds_a_store_of_the_same_model(model: Path, store: Path) -> None:
    prepare(model, store=store)
    prepare(model, store=store, dtype="float32")
    opened = Store(store)
    assert opened.dtype == torch.float32
    opened.close()


@pytest.mark.parametrize("count", [3, 6, 9])
def test_a_job_that_goes_on_weighs_columns_as_a_whole_one(
    count: int, model: Path, store: Path, tmp_path: Path
) -> None:
    add_letters(model)
    assert stop_after(count, lambda: prepare(model, store=store))
    assert contents(prepare(model, store=store)) == contents(prepare(model, store=tmp_path / "fresh"))


def test_an_unfinished_store_of_other_weights_is_not_continued(
    model: Path, store: Path, tmp_path: Path
) -> None:
    stop_after(4, lambda: prepare(model, store=store))
    replace_weights(model)
    assert contents(prepare(model, store=store)) == contents(prepare(model, store=tmp_path / "fresh"))


def test_weights_replaced_while_they_are_read_are_not_taken_for_the_new_ones(
    model: Path, store: Path, tmp_path: Path
) -> None:
    new = write_tiny(tmp_path / "new", "qwen2", torch.bfloat16, seed=1)
    done = False

    def progress(*_: Any) -> None:
        nonlocal done
        if not done:
            (new / "model.safetensors").rename(model / "model.safetensors")
            done = True

    with contextlib.suppress(StoreError):  # noticing it is as good
        prepare(model, store=store, progress=progress)
    fresh = prepare(model, store=tmp_path / "fresh")
    prepare(model, store=store)
    assert contents(store) == contents(fresh)


class Stopped(BaseException):
    """The process ends here."""


def stop_after(count: int, work: Callable[[], object]) -> bool:
    """Break ``work`` off when it is about to make its ``count``-th file durable; whether it came to that."""
    real, calls = os.fsync, 0

    def fsync(descriptor: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            raise Stopped
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        try:
            work()
        except Stopped:
            return True
    return False


# Places that are not ours


def test_a_store_of_another_model_is_not_overwritten(model: Path, store: Path, tmp_path: Path) -> None:
    prepare(model, store=store)
    before = contents(store)
    other = write_tiny(tmp_path / "other", "qwen2", torch.bfloat16, seed=3)
    with pytest.raises(StoreError, match=r"holds a store prepared from .*: choose another --store"):
        prepare(other, store=store)
    assert contents(store) == before


@pytest.mark.parametrize("damage", ["missing file", "version"])
def test_a_damaged_store_of_another_model_is_not_overwritten(
    model: Path, store: Path, tmp_path: Path, damage: str
) -> None:
    prepare(model, store=store)
    if damage == "version":
        data = json.loads((store / FILE_NAME).read_text())
        (store / FILE_NAME).write_text(json.dumps({**data, "version": 0}))
    else:
        (store / "layer-0000.residual").unlink()
    other = write_tiny(tmp_path / "other", "qwen2", torch.bfloat16, seed=3)
    with pytest.raises(StoreError):
        prepare(other, store=store)


def test_a_directory_of_other_files_is_refused_and_left_alone(model: Path, store: Path) -> None:
    store.mkdir()
    (store / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="is not empty and holds no readable store: choose another --store"):
        prepare(model, store=store)
    assert (store / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("way", ["rebuild", "a progress file of something else", "a tokenizer folder"])
def test_other_files_are_never_deleted(model: Path, store: Path, way: str) -> None:
    place = store / "tokenizer" / "thesis.txt" if way.startswith("a tok") else store / "thesis.txt"
    place.parent.mkdir(parents=True)
    place.write_text("years of work")
    if way.startswith("a progress"):
        (store / "progress.json").write_text("{}")
    with pytest.raises(StoreError):
        prepare(model, store=store, rebuild=way == "rebuild")
    assert place.read_text() == "years of work"


def test_a_checkpoint_is_not_rebuilt_into_a_store_in_place(model: Path) -> None:
    before = contents(model)
    with pytest.raises(StoreError):
        prepare(model, store=model, rebuild=True)
    assert before.items() <= contents(model).items()


def test_a_checkpoint_is_not_prepared_in_its_own_directory(model: Path) -> None:
    before = contents(model)
    with pytest.raises(StoreError, match="holds the checkpoint itself: choose another --store"):
        prepare(model, store=model)
    assert before.items() <= contents(model).items()


def test_a_place_that_is_a_file_is_refused(model: Path, store: Path) -> None:
    store.write_text("a file")
    with pytest.raises(StoreError, match="store"):
        prepare(model, store=store)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100 * 1024))
    with pytest.raises(StoreError, match=r"needs \d+\.\d+KiB more at .*store; 100.00KiB is free: .*--store"):
        prepare(model, store=store)
    assert not [path for path in store.rglob("*") if path.suffix in (".exact", ".residual", ".substitute")]
    monkeypatch.undo()
    prepare(model, store=store)


def test_what_is_there_already_counts_as_space(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stop_after(12, lambda: prepare(model, store=store))
    written = sum(len(content) for name, content in contents(store).items() if "." in name[1:])
    whole = sum(len(content) for content in contents(prepare(model, store=store.with_name("b"))).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=whole - written // 2))
    prepare(model, store=store)


def test_two_at_once_are_told(model: Path, store: Path) -> None:
    errors: list[StoreError] = []

    def second(*_: Any) -> None:
        try:
            prepare(model, store=store)
        except StoreError as error:
            errors.append(error)

    def progress(*_: Any) -> None:
        if not errors:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    prepare(model, store=store, progress=progress)
    assert str(errors[0]) == f"another process is preparing {store}: wait for it, then try again"
    prepare(model, store=store)


def test_the_lock_goes_with_a_failure(model: Path, store: Path) -> None:
    assert stop_after(3, lambda: prepare(model, store=store))
    with (store / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# A store in place of a model


def test_a_store_runs_without_its_checkpoint(model: Path, store: Path) -> None:
    prepare(model, store=store)
    before = answer(store)
    shutil.rmtree(model)
    assert prepare(store) == store
    assert answer(store) == before


def test_a_store_may_be_moved(model: Path, store: Path, tmp_path: Path) -> None:
    prepare(model, store=store)
    before = answer(store)
    store.rename(tmp_path / "moved")
    assert answer(tmp_path / "moved") == before


def test_a_store_in_place_of_a_model_is_neither_rebuilt_nor_converted(model: Path, store: Path) -> None:
    prepare(model, store=store)
    with pytest.raises(OptionError, match="is a store: to rebuild it, name the checkpoint"):
        prepare(store, rebuild=True)
    with pytest.raises(OptionError, match="was prepared in bfloat16: .* --dtype float32"):
        prepare(store, dtype="float32")
    assert prepare(store, dtype="bfloat16") == store
    (store / "layer-0001.residual").unlink()
    with pytest.raises(StoreError, match=r"layer-0001\.residual is missing"):
        prepare(store)


def test_a_dtype_that_is_none_is_named(model: Path, store: Path) -> None:
    with pytest.raises(OptionError, match="--dtype int4: choose one of bfloat16, float16, float32"):
        prepare(model, store=store, dtype="int4")
    assert not store.exists()


def test_a_model_that_cannot_be_used_leaves_no_store(tmp_path: Path, store: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(tiny_config("qwen2")))
    with pytest.raises(Exception, match="safetensors"):
        prepare(model, store=store)
    assert not store.exists()
