"""Open a store: what lies where, checked when first read."""

from pathlib import Path

import torch
from safetensors.torch import load

from subspec.memory.disk import ImageFile, check_crc32, writable
from subspec.memory.streamer import Unit
from subspec.models.config import ModelConfig
from subspec.store.layout import CODECS
from subspec.store.manifest import Manifest


class Store:
    """An open store.

    Attributes:
        directory: where it lies.
        manifest: what it says of itself.
        config: the model's configuration.
        dtype: of the exact weights.
        form: of the images that exact weights are streamed in: ``residual`` or ``exact``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = Manifest.read(directory)
        self.manifest.check_sizes(directory)
        self.config = ModelConfig.from_dict(self.manifest.config)
        self.dtype = self.manifest.torch_dtype
        self.form = CODECS[self.manifest.codec]
        self._files: dict[str, ImageFile] = {}
        for name in self.manifest.files:
            if name.startswith("tokenizer/"):
                self._check(name, (directory / name).read_bytes())

    def unit(self, name: str) -> Unit:
        """An image as a unit to stream."""
        record = self.manifest.files[name]
        return Unit(name, self.file(name), record.n_bytes, record.crc32)

    def file(self, name: str) -> ImageFile:
        """An image's open file; closed with the store."""
        if name not in self._files:
            self._files[name] = ImageFile(self.directory / name)
        return self._files[name]

    def load(self, name: str, target: torch.Tensor) -> None:
        """Read a whole image into ``target`` (page-aligned uint8, at least its size) and verify it.

        Raises:
            StoreError: the image is damaged or cannot be read.
        """
        view = writable(target)[: self.manifest.files[name].n_bytes]
        self.file(name).read(view, 0)
        self._check(name, view)

    def small_tensors(self) -> dict[str, torch.Tensor]:
        """Norms, biases and the embedding rows' checksums, by name.

        Raises:
            StoreError: the file is damaged.
        """
        content = (self.directory / "small.safetensors").read_bytes()
        self._check("small.safetensors", content)
        return load(content)

    def images(self) -> list[Path]:
        """What is streamed: the layers' and the head's images in ``form``."""
        return [
            self.directory / name
            for name in self.manifest.files
            if name.startswith(("layer-", "head-")) and name.endswith(f".{self.form}")
        ]

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache; True until a file was opened that refused."""
        return all(file.direct for file in self._files.values())

    def close(self) -> None:
        """Close every file."""
        for file in self._files.values():
            file.close()

    def _check(self, name: str, content: bytes | memoryview) -> None:
        """Compare content with the manifest's checksum.

        Raises:
            StoreError: they differ.
        """
        check_crc32(content, self.manifest.files[name].crc32, self.directory / name)
