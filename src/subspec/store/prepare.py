"""Checkpoint → store: exact images and substitutes, file by file.

Reads the checkpoint a matrix at a time, so that peak memory follows the largest matrix, not the model.
Every finished file is on disk before it is noted in ``progress.json``; a killed run goes on after the last
noted file.  The manifest comes last: a directory without one is never used.
"""

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from subspec.checkpoint import Checkpoint, open_checkpoint
from subspec.errors import OptionError, StoreError
from subspec.memory.disk import cache_directory
from subspec.memory.tiers import format_size, page_aligned
from subspec.models.config import ModelConfig
from subspec.store import manifest as manifests
from subspec.store.layout import head_chunks, layer_bytes
from subspec.store.manifest import DTYPES, FileRecord, Manifest, is_store, write_atomically
from subspec.store.writer import StoreWriter
from subspec.substitute.layout import tile_bytes

Progress = Callable[[str, int, int], None]
PROGRESS_FILE = "progress.json"


def prepare(
    model: str | Path,
    *,
    store: Path | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    rebuild: bool = False,
) -> Path:
    """Make sure that a complete, current store of ``model`` exists.

    Args:
        model: a checkpoint (directory, GGUF file, hub id, ``demo``), or a store, which is only checked.
        store: where to put it; default: a directory named after the model under ``cache_directory()``.
        dtype: ``bfloat16``, ``float16`` or ``float32`` instead of the checkpoint's own.
        progress: called with (task, bytes done, bytes in all).
        rebuild: start afresh even if the store looks complete.

    Returns:
        The store's directory.

    Raises:
        ModelError: the checkpoint cannot be used.
        StoreError: ``store`` holds something else, another process prepares it, or the disk is too small.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if store is None and is_store(Path(model)):
        return _check_store(Path(model), dtype, rebuild)
    checkpoint = open_checkpoint(model, DTYPES[dtype] if dtype else None)
    try:
        config = ModelConfig.from_dict(checkpoint.config)
        config.check_tensors(checkpoint.tensors)
        directory = store or _default_directory(checkpoint)
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            if rebuild or not _is_current(directory, checkpoint):
                _build(directory, checkpoint, config, progress)
        return directory
    finally:
        checkpoint.close()


def _check_store(directory: Path, dtype: str | None, rebuild: bool) -> Path:
    """A store given in place of a model: it must be complete, and of the wanted dtype."""
    found = Manifest.read(directory)
    found.check_sizes(directory)
    if rebuild:
        raise OptionError(
            f"{directory} is a store: to rebuild it, name the checkpoint and --store {directory}"
        )
    if dtype not in (None, found.dtype):
        raise OptionError(
            f"{directory} was prepared in {found.dtype}: prepare the checkpoint again with --dtype {dtype}"
        )
    return directory


def _default_directory(checkpoint: Checkpoint) -> Path:
    """A place of its own for each checkpoint path and dtype."""
    key = f"{Path(checkpoint.path).resolve()} {checkpoint.dtype}"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint.name)
    return cache_directory() / "stores" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the store against other processes; the lock goes with the process."""
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(
                f"another process is preparing {directory}: wait for it, then try again"
            ) from error
        yield


def _is_current(directory: Path, checkpoint: Checkpoint) -> bool:
    """Whether the directory holds a complete store of this very checkpoint.

    Raises:
        StoreError: it holds a store of another model, or files that are not a store's.
    """
    foreign = {path.name for path in directory.iterdir()} - {
        ".lock",
        PROGRESS_FILE,
        manifests.FILE_NAME,
        "tokenizer",
    }
    if not is_store(directory):
        if not (directory / PROGRESS_FILE).exists() and foreign:
            raise StoreError(f"{directory} is not empty and holds no store: choose another --store")
        return False
    try:
        found = Manifest.read(directory)
        found.check_sizes(directory)
    except StoreError:
        return False
    if found.source.get("path") != checkpoint.identity().get("path"):
        raise StoreError(
            f"{directory} holds {found.name}, prepared from {found.source.get('path')}: choose another "
            "--store, or delete it"
        )
    return found.source == checkpoint.identity() and found.torch_dtype == checkpoint.dtype


def _build(directory: Path, checkpoint: Checkpoint, config: ModelConfig, progress: Progress | None) -> None:
    """Write every file that the progress file does not name, then the manifest."""
    dtype_name = next(name for name, dtype in DTYPES.items() if dtype == checkpoint.dtype)
    key = {
        "version": manifests.VERSION,
        "codec": manifests.CODEC,
        "dtype": dtype_name,
        "source": checkpoint.identity(),
    }
    done = _finished_files(directory, key)
    if not done:
        _clear(directory)
    _check_space(
        directory, config, checkpoint.dtype.itemsize, sum(record.n_bytes for record in done.values())
    )

    def note(name: str, record: FileRecord) -> None:
        done[name] = record
        write_atomically(directory / PROGRESS_FILE, json.dumps({**key, "files": _plain(done)}))

    write_atomically(directory / PROGRESS_FILE, json.dumps({**key, "files": _plain(done)}))
    writer = StoreWriter(directory, checkpoint, config)
    for task in writer.tasks():
        if not all(name in done for name in task.files):
            for name, record in task.run().items():
                note(name, record)
        if progress is not None:
            progress(
                "preparing",
                sum(record.n_bytes for record in done.values()),
                store_bytes(config, checkpoint.dtype.itemsize),
            )
    Manifest(checkpoint.name, dtype_name, checkpoint.config, checkpoint.identity(), done).write(directory)
    (directory / PROGRESS_FILE).unlink(missing_ok=True)


def _plain(files: dict[str, FileRecord]) -> dict[str, dict[str, int]]:
    """File records as plain data."""
    return {name: asdict(record) for name, record in files.items()}


def _finished_files(directory: Path, key: dict[str, object]) -> dict[str, FileRecord]:
    """What an earlier, broken-off run of the same job finished, as far as it is still there."""
    try:
        state = json.loads((directory / PROGRESS_FILE).read_text())
        files = {name: FileRecord(**record) for name, record in state.pop("files").items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    if state != json.loads(json.dumps(key)):
        return {}
    sizes = {name: (directory / name).stat().st_size for name in files if (directory / name).is_file()}
    return {name: record for name, record in files.items() if sizes.get(name) == record.n_bytes}


def _clear(directory: Path) -> None:
    """Remove a stale or foreign attempt; the manifest first, so that no half-removed store looks complete."""
    (directory / manifests.FILE_NAME).unlink(missing_ok=True)
    for path in directory.iterdir():
        if path.name == "tokenizer":
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def store_bytes(config: ModelConfig, itemsize: int) -> int:
    """Size of a store's images (its small files, a few MB, left out)."""
    exact, substitute = layer_bytes(config, itemsize)
    total = config.layers * (page_aligned(exact) + page_aligned(substitute))
    for chunk in head_chunks(config, itemsize):
        rows = chunk.stop - chunk.start
        total += page_aligned(rows * config.hidden_size * itemsize) + page_aligned(
            tile_bytes(rows, config.hidden_size)
        )
    if not config.tied_embeddings:
        total += page_aligned(config.vocab_size * config.hidden_size * itemsize)
    return total


def _check_space(directory: Path, config: ModelConfig, itemsize: int, done_bytes: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        StoreError: free space is too small.
    """
    needed = store_bytes(config, itemsize) - done_bytes
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise StoreError(
            f"the store needs {format_size(needed)} more at {directory}; {format_size(free)} is free: "
            "free some, or choose another place with --store"
        )
