"""Bytes of a file at an offset, by plain reads.

Model files are not memory-mapped: mapped pages count as the process's memory (reading a 1 GB shard tensor by
tensor through ``safetensors`` raises the peak by 1 GB), and a file truncated meanwhile kills the process.
Knows nothing of formats.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from subspec.errors import ModelError


class ByteFile:
    """A file opened for positioned reads; safe to share between threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(f"{path} cannot be opened: {error.strerror}") from error
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> torch.Tensor:
        """``size`` bytes at ``offset``, as a fresh uint8 tensor.

        Raises:
            ModelError: the file ends earlier, is closed, or cannot be read.
        """
        result = torch.empty(size, dtype=torch.uint8)
        view, done = memoryview(result.numpy().data), 0
        while done < size:
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise ModelError(f"{self.path} cannot be read: {error.strerror}") from error
            if count == 0:
                have = os.fstat(self._descriptor).st_size
                raise ModelError(f"{self.path} is truncated: {offset + size} bytes are needed, it has {have}")
            done += count
        return result

    def read_bytes(self, offset: int, size: int) -> bytes:
        """The same as ``bytes``."""
        return self.read(offset, size).numpy().tobytes()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
