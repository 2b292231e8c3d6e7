"""A preparation that ends anywhere: nothing half-done is used, and the next one goes on where it was."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny

from subspec.errors import StoreError
from subspec.store.manifest import FILE_NAME, is_store
from subspec.store.prepare import prepare
from subspec.store.reader import Store

FIRST_NOTE = 1
CHILD = """
import os, sys
from pathlib import Path
from subspec.store.prepare import prepare
real, calls = os.fsync, 0
def fsync(descriptor):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        print("here", flush=True)
        sys.stdin.read()  # for ever: it is killed
    real(descriptor)
os.fsync = fsync
prepare(Path(sys.argv[1]), store=Path(sys.argv[2]))
"""


class Stopped(BaseException):
    """The process ends here."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", "qwen2", torch.bfloat16, num_hidden_layers=2, vocab_size=100)


@contextmanager
def stopping_at(count: int) -> Iterator[list[int]]:
    """``os.fsync`` raises at its ``count``-th call: every file and every note of progress passes there."""
    real, calls = os.fsync, [0]

    def fsync(descriptor: Any) -> None:
        calls[0] += 1
        if calls[0] == count:
            raise Stopped
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield calls


def contents(store: Path) -> dict[str, bytes]:
    """Every file; the manifest with its names in order, for a resumed run notes them in another one."""
    found = {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    found[FILE_NAME] = json.dumps(json.loads(found[FILE_NAME]), sort_keys=True).encode()
    return found


def finished(store: Path) -> dict[str, tuple[int, int]]:
    """The files that a broken-off run noted as finished, with what tells them from ones written anew."""
    path = store / "progress.json"
    names = json.loads(path.read_text())["files"] if path.exists() else {}
    return {name: ((store / name).stat().st_ino, (store / name).stat().st_mtime_ns) for name in names}


def check_resumed(model: Path, store: Path, reference: dict[str, bytes]) -> None:
    """After a break: unusable; prepared again without redoing what was finished; then as if undisturbed."""
    assert not is_store(store)
    with pytest.raises(StoreError):
        Store(store)
    before = finished(store)
    prepare(model, store=store)
    assert contents(store) == reference
    for name, state in before.items():
        if {
            name.replace(".residual", ".substitute"),
            name.replace(".substitute", ".residual"),
        } - before.keys():
            continue  # both forms of a layer are made together
        assert ((store / name).stat().st_ino, (store / name).stat().st_mtime_ns) == state, (
            f"{name} was redone"
        )
    Store(store).close()


def test_it_may_end_at_any_file(model: Path, tmp_path: Path) -> None:
    with stopping_at(-1) as calls:
        prepare(model, store=tmp_path / "reference")
    reference, points = contents(tmp_path / "reference"), calls[0]
    assert points > 10
    for count in range(FIRST_NOTE + 1, points + 1):
        store = tmp_path / f"store{count}"
        with pytest.raises(Stopped), stopping_at(count):
            prepare(model, store=store)
        check_resumed(model, store, reference)


@pytest.mark.parametrize("count", range(1, FIRST_NOTE + 1))
def test_it_may_end_before_anything_is_noted(model: Path, tmp_path: Path, count: int) -> None:
    reference = contents(prepare(model, store=tmp_path / "reference"))
    with pytest.raises(Stopped), stopping_at(count):
        prepare(model, store=tmp_path / "store")
    check_resumed(model, tmp_path / "store", reference)


def test_it_may_end_again_and_again(model: Path, tmp_path: Path) -> None:
    reference, store = contents(prepare(model, store=tmp_path / "reference")), tmp_path / "store"
    runs = 0
    while not is_store(store):
        runs += 1
        assert runs < 100, "it does not get on"
        try:
            with stopping_at(6):  # three files and their notes
                prepare(model, store=store)
        except Stopped:
            assert not is_store(store)
    assert runs > 2
    assert contents(store) == reference


def test_it_may_end_while_a_stale_store_is_removed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real, removed = tmp_path / "store", Path.unlink, 0
    prepare(model, store=store)
    os.utime(model / "model.safetensors", ns=(1, 1))
    reference = contents(prepare(model, store=tmp_path / "reference"))

    def unlink(path: Path, missing_ok: bool = False) -> None:
        nonlocal removed
        removed += path.suffix in (".exact", ".residual", ".substitute")
        if removed == 3:
            raise Stopped
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(Stopped):
            prepare(model, store=store)
    check_resumed(model, store, reference)


def test_a_store_that_was_complete_when_the_run_ended_can_be_rebuilt(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real = tmp_path / "store", Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "progress.json":
            raise Stopped
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(Stopped):
            prepare(model, store=store)
    prepare(model, store=store)
    good = (store / "layer-0000.residual").read_bytes()
    (store / "layer-0000.residual").write_bytes(bytes(len(good)))
    prepare(model, store=store, rebuild=True)
    assert (store / "layer-0000.residual").read_bytes() == good


def test_noted_files_that_are_gone_or_cut_are_made_again(model: Path, tmp_path: Path) -> None:
    reference, store = contents(prepare(model, store=tmp_path / "reference")), tmp_path / "store"
    with pytest.raises(Stopped), stopping_at(12):
        prepare(model, store=store)
    names = sorted(finished(store))
    (store / names[0]).unlink()
    (store / names[-1]).write_bytes(b"short")
    prepare(model, store=store)
    assert contents(store) == reference


@pytest.mark.parametrize("note", ["", "{", "[]", "null", '{"files": 3}', '{"files": {"a": {}}}'])
def test_a_broken_note_of_progress_starts_afresh(model: Path, tmp_path: Path, note: str) -> None:
    reference, store = contents(prepare(model, store=tmp_path / "reference")), tmp_path / "store"
    with pytest.raises(Stopped), stopping_at(8):
        prepare(model, store=store)
    (store / "progress.json").write_text(note)
    prepare(model, store=store)
    assert contents(store) == reference


def test_a_killed_process_leaves_what_the_next_one_goes_on_from(model: Path, tmp_path: Path) -> None:
    reference, store = contents(prepare(model, store=tmp_path / "reference")), tmp_path / "store"
    arguments = [sys.executable, "-c", CHILD, str(model), str(store), "5"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        with pytest.raises(StoreError, match="another process is preparing"):
            prepare(model, store=store)
        child.send_signal(signal.SIGKILL)
    assert (store / FILE_NAME).exists() is False
    assert finished(store)
    check_resumed(model, store, reference)
