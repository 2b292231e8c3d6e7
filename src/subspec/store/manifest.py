"""The store's manifest: format version, codec, source identity, and every file with size and checksum."""

import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from subspec.errors import StoreError
from subspec.store.layout import CODECS
from subspec.substitute.layout import GROUP

FORMAT = "subspec-store"
VERSION = 2
BITS = 4
FILE_NAME = "manifest.json"
_FORM = {"version": VERSION, "bits": BITS, "group": GROUP}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and CRC-32 of one file.

    Attributes:
        tensors: SHA-256, in hexadecimal, of the exact tensors whose last part the file holds, by name.
    """

    n_bytes: int
    crc32: int
    tensors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a complete store says of itself.

    Attributes:
        name: the model's short name.
        dtype: of the exact weights: a key of ``DTYPES``.
        config: the checkpoint's configuration, as ``models.config`` reads it.
        source: identity of the checkpoint it was made from.
        files: by path relative to the store.
        codec: how exact weights are kept: a key of ``layout.CODECS``.
    """

    name: str
    dtype: str
    config: dict[str, Any]
    source: dict[str, Any]
    files: dict[str, FileRecord] = field(default_factory=dict)
    format: str = FORMAT
    version: int = VERSION
    codec: str = "residual"
    bits: int = BITS
    group: int = GROUP

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch's."""
        return DTYPES[self.dtype]

    def write(self, directory: Path) -> None:
        """Put the manifest in place, atomically: its presence says that the store is complete."""
        data = asdict(self)
        write_atomically(directory / FILE_NAME, json.dumps({**data, "crc32": _checksum(data)}, indent=1))

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """The manifest of a store.

        Raises:
            StoreError: there is none, it is damaged, or of another format version or codec.
        """
        path = directory / FILE_NAME
        try:
            data = json.loads(path.read_text())
        except OSError as error:
            raise StoreError(
                f"{directory} holds no prepared model ({error.strerror}: {FILE_NAME})"
            ) from error
        except ValueError as error:
            raise StoreError(f"{path} is damaged ({error}): prepare the model again") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise StoreError(f"{path} is not a manifest of a subspec store")
        if any(data.get(name) != value for name, value in _FORM.items()) or data.get("codec") not in tuple(
            CODECS
        ):
            raise StoreError(
                f"{directory} has {_describe(data)}; this subspec reads "
                f"{_describe({**_FORM, 'codec': ' or '.join(CODECS)})}: "
                "prepare the model again"
            )
        if data.pop("crc32", None) != _checksum(data):
            raise StoreError(f"{path} is damaged (its checksum does not match): prepare the model again")
        try:
            data["files"] = {name: FileRecord(**record) for name, record in data["files"].items()}
            manifest = cls(**data)
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path} is damaged ({error!r}): prepare the model again") from error
        if manifest.dtype not in DTYPES:
            raise StoreError(f"{path} is damaged (dtype {manifest.dtype!r}): prepare the model again")
        return manifest

    def check_sizes(self, directory: Path) -> None:
        """Compare every file's size with its record.

        Raises:
            StoreError: a file is missing or has another size.
        """
        for name, record in self.files.items():
            path = directory / name
            found = path.stat().st_size if path.is_file() else None
            if found != record.n_bytes:
                state = "is missing" if found is None else f"has {found} bytes instead of {record.n_bytes}"
                raise StoreError(f"{path} {state}: prepare the model again")


def _describe(form: dict[str, Any]) -> str:
    """A store's form in words."""
    return (
        f"format version {form.get('version')}, codec {form.get('codec')}, "
        f"{form.get('bits')} bits in groups of {form.get('group')}"
    )


def _checksum(data: dict[str, Any]) -> int:
    """CRC-32 of plain data in one fixed spelling."""
    return zlib.crc32(json.dumps(data, sort_keys=True).encode())


def is_store(directory: Path) -> bool:
    """Whether a directory holds a manifest of ours."""
    path = directory / FILE_NAME
    if not path.is_file():
        return False
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file's content all at once, and only after it reached the disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
