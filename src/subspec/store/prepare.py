"""Checkpoint → store: substitutes, and residuals or exact images, file by file.

Reads the checkpoint a layer at a time, so that peak memory follows the largest layer, not the model.
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
from typing import Any

import torch

from subspec.checkpoint import Checkpoint, open_checkpoint
from subspec.errors import OptionError, StoreError
from subspec.kernels.native import kernels
from subspec.memory.disk import cache_directory
from subspec.memory.tiers import format_size, page_aligned
from subspec.models.config import ModelConfig
from subspec.store import manifest as manifests
from subspec.store.layout import CODECS, head_chunks, layer_bytes
from subspec.store.manifest import DTYPES, FileRecord, Manifest, is_store, write_atomically
from subspec.store.writer import StoreWriter
from subspec.substitute.layout import tile_bytes

Progress = Callable[[str, int, int], None]
PROGRESS_FILE = "progress.json"
EXPECTED_RESIDUAL_SHARE = 0.7  # of the exact weights' bytes; trained bf16 weights take 0.48, fp16 0.67
_MARKS = {name + end for name in (manifests.FILE_NAME, PROGRESS_FILE) for end in ("", ".partial")}
_IMAGES = (".exact", ".residual", ".substitute")
_OURS = re.compile(
    r"((layer|head)-\d+\.(exact|residual|substitute)|embedding\.exact|small\.safetensors)(\.partial)?"
)


def prepare(
    model: str | Path,
    *,
    store: Path | None = None,
    dtype: str | None = None,
    stream: str | None = None,
    progress: Progress | None = None,
    rebuild: bool = False,
) -> Path:
    """Make sure that a complete, current store of ``model`` exists.

    Args:
        model: a checkpoint (directory, GGUF file, hub id, ``demo``), or a store, which is only checked.
        store: where to put it; default: a directory named after the model under ``cache_directory()``.
        dtype: ``bfloat16``, ``float16`` or ``float32`` instead of the checkpoint's own.
        stream: how exact weights are kept and streamed: ``residual``, or ``raw``, twice as large; default:
            what ``store`` holds already, else ``residual`` for weights of 16 bits, and ``raw`` for fp32 or
            where there are no native kernels.
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
    if stream not in (None, *CODECS):
        raise OptionError(f"--stream {stream}: choose one of {', '.join(CODECS)}")
    if store is None and is_store(Path(model)):
        return _check_store(Path(model), dtype, stream, rebuild)
    checkpoint = open_checkpoint(model, DTYPES[dtype] if dtype else None)
    try:
        config = ModelConfig.from_dict(checkpoint.config)
        config.check_tensors(checkpoint.tensors)
        kept = _kept_codec(store, checkpoint.dtype)
        codec = _codec(checkpoint.dtype, stream or kept)
        if kept not in (None, codec) and not rebuild:
            raise OptionError(
                f"{store} was prepared to stream {kept}: choose another --store, or replace it with: "
                f"subspec prepare MODEL --store {store} --stream {codec} --rebuild"
            )
        directory = store or _default_directory(checkpoint, codec)
        if directory.resolve() in (checkpoint.path.resolve(), checkpoint.path.resolve().parent):
            raise StoreError(f"{directory} holds the checkpoint itself: choose another --store")
        identity = checkpoint.identity()
        try:
            if directory.is_dir():
                _check_owner(directory, identity)  # before a lock is left in what is not ours
            directory.mkdir(parents=True, exist_ok=True)
            with _locked(directory):
                _check_owner(directory, identity)
                if rebuild or not _is_current(directory, identity, checkpoint.dtype, codec):
                    _build(directory, checkpoint, identity, config, codec, progress)
        except OSError as error:
            reason = error.strerror or str(error)
            raise StoreError(f"{directory} cannot be written ({reason}): choose another --store") from error
        return directory
    finally:
        checkpoint.close()


def _codec(dtype: torch.dtype, stream: str | None) -> str:
    """The codec for exact weights of a dtype; without native kernels, rebuilding them would take too long.

    Raises:
        OptionError: fp32 has no residual form.
    """
    if dtype == torch.float32 and stream == "residual":
        raise OptionError(
            "--stream residual: fp32 weights have no residual form: use raw, or --dtype bfloat16"
        )
    if stream is None and kernels().library is None:
        return "raw"
    return stream or ("raw" if dtype == torch.float32 else "residual")


def _kept_codec(directory: Path | None, dtype: torch.dtype) -> str | None:
    """The codec of the 16-bit weights that a directory holds, complete or not; None if it does not say."""
    if directory is None or dtype == torch.float32:
        return None
    for mark in (manifests.FILE_NAME, PROGRESS_FILE):
        note = _read_json(directory / mark)
        known = note.get("format") == manifests.FORMAT and note.get("version") == manifests.VERSION
        if known and note.get("codec") in tuple(CODECS) and note.get("dtype") != "float32":
            return str(note["codec"])
    return None


def _check_store(directory: Path, dtype: str | None, stream: str | None, rebuild: bool) -> Path:
    """A store given in place of a model: it must be complete, and of the wanted dtype and codec."""
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
    if stream not in (None, found.codec):
        raise OptionError(
            f"{directory} was prepared to stream {found.codec}: prepare the checkpoint again with "
            f"--stream {stream}"
        )
    return directory


def _default_directory(checkpoint: Checkpoint, codec: str) -> Path:
    """A place of its own for each checkpoint path and dtype; 16-bit weights kept raw have another."""
    key = f"{Path(checkpoint.path).resolve()} {checkpoint.dtype}"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint.name)
    if codec == "raw" and checkpoint.dtype != torch.float32:
        name, key = f"{name}-{codec}", f"{key} {codec}"
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


def _check_owner(directory: Path, identity: dict[str, Any]) -> None:
    """Make sure that what the directory holds is a store, or an attempt at one, of this very checkpoint.

    Raises:
        StoreError: it holds another model's store, or files that are not a store's.
    """
    for mark in (manifests.FILE_NAME, PROGRESS_FILE):
        note = _read_json(directory / mark)
        if note.get("format") == manifests.FORMAT:
            source = note.get("source")
            owner = source.get("path") if isinstance(source, dict) else None
            if owner != identity.get("path"):
                raise StoreError(
                    f"{directory} holds a store prepared from {owner}: choose another --store, or delete it"
                )
            return
    strangers = {path.name for path in directory.iterdir() if not _OURS.fullmatch(path.name)} - _MARKS
    if strangers - {".lock"}:
        raise StoreError(f"{directory} is not empty and holds no readable store: choose another --store")


def _is_current(directory: Path, identity: dict[str, Any], dtype: torch.dtype, codec: str) -> bool:
    """Whether the directory holds a complete store of the checkpoint as it is, in its dtype and a codec."""
    try:
        found = Manifest.read(directory)
        found.check_sizes(directory)
    except StoreError:
        return False
    return found.source == identity and found.torch_dtype == dtype and found.codec == codec


def _build(
    directory: Path,
    checkpoint: Checkpoint,
    identity: dict[str, Any],
    config: ModelConfig,
    codec: str,
    progress: Progress | None,
) -> None:
    """Write every file that an unfinished attempt has not written yet, then the manifest.

    Raises:
        StoreError: the disk is too small, or the checkpoint changed meanwhile.
    """
    dtype_name = next(name for name, dtype in DTYPES.items() if dtype == checkpoint.dtype)
    job = {
        "format": manifests.FORMAT,
        "version": manifests.VERSION,
        "codec": codec,
        "dtype": dtype_name,
        "source": identity,
    }
    refused = (directory / manifests.FILE_NAME).exists()  # a stale or damaged store: nothing of it is kept
    done = {} if refused else _finished_files(directory, job)
    _note(directory, job, done)
    if not done:
        _clear(directory)
    _check_space(directory, store_bytes(config, checkpoint.dtype.itemsize, codec) - _image_bytes(done))
    tasks = list(StoreWriter(directory, checkpoint, config, codec).tasks())
    total, prepared = sum(task.source_bytes for task in tasks), 0
    for task in tasks:
        if not all(name in done for name in task.files):
            done.update(task.run())
            _note(directory, job, done)
        prepared += task.source_bytes
        if progress is not None:
            progress("preparing", prepared, total)
    if checkpoint.identity() != identity:
        raise StoreError(f"{checkpoint.path} changed while it was prepared: run the command again")
    files = dict(sorted(done.items()))
    Manifest(checkpoint.name, dtype_name, checkpoint.config, identity, files, codec=codec).write(directory)
    (directory / PROGRESS_FILE).unlink(missing_ok=True)


def _note(directory: Path, job: dict[str, Any], done: dict[str, FileRecord]) -> None:
    """Put down which job is under way and what of it is on disk."""
    files = {name: asdict(record) for name, record in done.items()}
    write_atomically(directory / PROGRESS_FILE, json.dumps({**job, "files": files}))


def _finished_files(directory: Path, job: dict[str, Any]) -> dict[str, FileRecord]:
    """What an earlier, broken-off run of the same job finished, as far as it is still there."""
    note = _read_json(directory / PROGRESS_FILE)
    try:
        files = {name: FileRecord(**record) for name, record in note.pop("files", {}).items()}
    except (TypeError, AttributeError):
        return {}
    if note != json.loads(json.dumps(job)):
        return {}
    sizes = {name: (directory / name).stat().st_size for name in files if (directory / name).is_file()}
    return {name: record for name, record in files.items() if sizes.get(name) == record.n_bytes}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none that can be read."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _clear(directory: Path) -> None:
    """Remove a store's files and no others; the manifest first: what is left must not look complete."""
    (directory / manifests.FILE_NAME).unlink(missing_ok=True)
    for path in directory.iterdir():
        if path.name == "tokenizer" and path.is_dir():
            shutil.rmtree(path)
        elif _OURS.fullmatch(path.name):
            path.unlink()


def _image_bytes(files: dict[str, FileRecord]) -> int:
    """Bytes of the images among some files."""
    return sum(record.n_bytes for name, record in files.items() if name.endswith(_IMAGES))


def store_bytes(config: ModelConfig, itemsize: int, codec: str) -> int:
    """About the size of a store's images (its small files, a few MB, left out); exactly that if raw."""
    share = EXPECTED_RESIDUAL_SHARE if codec == "residual" else 1.0
    exact, substitute = layer_bytes(config, itemsize)
    total = config.layers * (page_aligned(int(exact * share)) + page_aligned(substitute))
    for chunk in head_chunks(config, itemsize):
        rows = chunk.stop - chunk.start
        total += page_aligned(int(rows * config.hidden_size * itemsize * share))
        total += page_aligned(tile_bytes(rows, config.hidden_size))
    if not config.tied_embeddings:
        total += page_aligned(config.vocab_size * config.hidden_size * itemsize)
    return total


def _check_space(directory: Path, needed_bytes: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        StoreError: free space is too small.
    """
    free = shutil.disk_usage(directory).free
    if needed_bytes > free:
        raise StoreError(
            f"the store needs {format_size(needed_bytes)} more at {directory}; {format_size(free)} is free: "
            "free some, or choose another place with --store"
        )
