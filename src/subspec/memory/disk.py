"""Reads that bypass the page cache, and how fast they are.

Streamed weights are read once a sweep, in a cycle longer than any cache: the page cache would only take the
memory that the budget promised to leave.  Where O_DIRECT is refused (tmpfs, some overlays), reads are
buffered and their pages dropped at once; ``ImageFile.direct`` tells which.
"""

import contextlib
import errno
import os
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from subspec.errors import StoreError
from subspec.memory.arena import map_bytes
from subspec.memory.tiers import PAGE_BYTES, page_aligned


class ImageFile:
    """An open image: a file of whole 4 KiB pages, read at page-aligned offsets into page-aligned memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd, self.direct, self.refusal = _open(path)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be opened ({error.strerror}): prepare the model again"
            ) from error
        self.n_bytes = os.fstat(self._fd).st_size

    def read(self, target: memoryview, offset: int) -> None:
        """Fill ``target`` (whole pages, page-aligned) from byte ``offset`` on; releases the GIL.

        Raises:
            StoreError: the file ends too early, or the device fails.
        """
        done, wanted = 0, len(target)
        while done < wanted:
            try:
                count = os.preadv(self._fd, [target[done:]], offset + done)
            except OSError as error:
                raise StoreError(
                    f"{self.path}: reading at byte {offset + done} failed: {error.strerror}"
                ) from error
            done += count
            if done == wanted:
                break
            if count == 0 or offset + done >= os.fstat(self._fd).st_size:
                raise StoreError(
                    f"{self.path} ends at byte {offset + done}, {offset + wanted} were expected: "
                    "prepare the model again"
                )
            if self.direct:
                done -= done % PAGE_BYTES  # a short read may end inside a page; O_DIRECT goes on at its start
        if not self.direct:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fd, offset, wanted, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the descriptor; reading afterwards is an error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open(path: Path) -> tuple[int, bool, str]:
    """Open for direct reads if the file system takes them: descriptor, direct or not, why not."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return os.open(path, os.O_RDONLY), False, "this system has no O_DIRECT"
    try:
        descriptor = os.open(path, os.O_RDONLY | flag)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY), False, "the file system refuses O_DIRECT"
    try:
        os.preadv(descriptor, [writable(map_bytes(PAGE_BYTES))], 0)
    except OSError:
        os.close(descriptor)
        return os.open(path, os.O_RDONLY), False, "the file system fails O_DIRECT reads"
    return descriptor, True, ""


def cache_directory() -> Path:
    """Where stores and models lie by default: ``$XDG_CACHE_HOME/subspec``, else ``~/.cache/subspec``."""
    cache = os.environ.get("XDG_CACHE_HOME", "")  # the convention: a relative path there is to be ignored
    base = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    return base / "subspec"


def writable(buffer: torch.Tensor) -> memoryview:
    """A writable view of a uint8 tensor's bytes, for reads into it."""
    return buffer.numpy().data


def direct_reads(directory: Path) -> tuple[bool, str]:
    """Whether files in ``directory`` can be read with O_DIRECT, and if not, why."""
    probe = directory / f".probe-{os.getpid()}"
    try:
        probe.write_bytes(bytes(PAGE_BYTES))
    except OSError as error:
        return False, f"{directory} is not writable: {error.strerror}"
    try:
        file = ImageFile(probe)
        file.close()
        return file.direct, file.refusal
    finally:
        probe.unlink()


def drop_cached(path: Path) -> None:
    """Let the page cache forget a file whose pages are clean; a hint, ignored where there is no cache."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def check_crc32(content: bytes | memoryview, expected: int, path: Path, part: str = "") -> None:
    """Compare bytes that were read from ``path`` with their checksum.

    Args:
        content: the bytes.
        expected: their CRC-32.
        path: the file, for the message.
        part: what of the file, if not all of it.

    Raises:
        StoreError: they differ.
    """
    require_crc32(zlib.crc32(content), expected, path, part)


def require_crc32(found: int, expected: int, path: Path, part: str = "") -> None:
    """Compare a checksum with what it must be; arguments and error are ``check_crc32``'s."""
    if found != expected:
        where = f"{part} differs: " if part else ""
        raise StoreError(
            f"{path} is damaged: {where}its CRC-32 is {found:08x}, the manifest says {expected:08x}; "
            f"prepare the model again with: subspec prepare MODEL --store {path.parent} --rebuild"
        )


@dataclass(frozen=True)
class ReadSpeed:
    """What one measurement of reads gave; ``direct`` is False where the page cache took part."""

    bytes_per_s: float
    direct: bool


def measure_read(paths: Sequence[Path], threads: int, request_bytes: int, total_bytes: int) -> ReadSpeed:
    """Read about ``total_bytes`` of ``paths`` (whole requests, cycling) with ``threads`` threads, timed.

    Raises:
        StoreError: there is nothing to read, or a read fails.
    """
    files = [ImageFile(path) for path in paths]
    try:
        requests = _requests(files, request_bytes, total_bytes)
        if not requests:
            raise StoreError("there is no image to measure the disk with: prepare a model first")
        buffers = [writable(map_bytes(page_aligned(request_bytes))) for _ in range(threads)]
        failures: list[BaseException] = []

        def work(worker: int) -> None:
            try:
                for file, offset, size in requests[worker::threads]:
                    file.read(buffers[worker][:size], offset)
            except StoreError as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        elapsed_s = time.perf_counter() - start
        if failures:
            raise failures[0]
        return ReadSpeed(sum(size for _, _, size in requests) / elapsed_s, all(file.direct for file in files))
    finally:
        for file in files:
            file.close()


def _requests(
    files: Sequence[ImageFile], request_bytes: int, total_bytes: int
) -> list[tuple[ImageFile, int, int]]:
    """(file, offset, bytes) of consecutive requests over the files, cycling until it is enough."""
    one_round = [
        (file, offset, min(request_bytes, file.n_bytes - offset))
        for file in files
        for offset in range(0, file.n_bytes - file.n_bytes % PAGE_BYTES, request_bytes)
    ]
    one_round = [
        (file, offset, size - size % PAGE_BYTES) for file, offset, size in one_round if size >= PAGE_BYTES
    ]
    chosen: list[tuple[ImageFile, int, int]] = []
    size_so_far = 0
    while one_round and size_so_far < total_bytes:
        for request in one_round:
            chosen.append(request)
            size_so_far += request[2]
            if size_so_far >= total_bytes:
                break
    return chosen
