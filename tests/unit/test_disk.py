"""Reads of images: complete or refused, direct or not, whatever the system returns."""

import errno
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import finishes

from subspec.errors import StoreError
from subspec.memory.arena import map_bytes
from subspec.memory.disk import ImageFile, direct_reads, drop_cached, measure_read, writable
from subspec.memory.tiers import PAGE_BYTES

PAGES = 9
SHARED_MEMORY = Path("/dev/shm")  # tmpfs


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random.Random(0).randbytes(PAGES * PAGE_BYTES))
    return path


@pytest.fixture(params=["direct", "buffered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Reads as the file system allows them, and with O_DIRECT refused as some file systems do."""
    if request.param == "buffered":
        refuse_direct(monkeypatch)
    return str(request.param)


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)


def read(file: ImageFile, pages: int, first: int = 0) -> bytes:
    target = map_bytes(max(pages, 1) * PAGE_BYTES)
    target.fill_(0xEE)
    file.read(writable(target)[: pages * PAGE_BYTES], first * PAGE_BYTES)
    return target.numpy()[: pages * PAGE_BYTES].tobytes()


def test_every_run_of_pages_is_read_as_it_is(image: Path, way: str) -> None:
    content, file = image.read_bytes(), ImageFile(image)
    assert file.n_bytes == len(content)
    if way == "buffered":
        assert not file.direct
    for first in range(PAGES):
        for pages in range(1, PAGES - first + 1):
            expected = content[first * PAGE_BYTES : (first + pages) * PAGE_BYTES]
            assert read(file, pages, first) == expected
    file.close()


@pytest.mark.parametrize("seed", range(5))
def test_short_reads_are_completed(image: Path, way: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng, real = random.Random(seed), os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        size = len(buffers[0])
        if size > PAGE_BYTES and rng.random() < 0.8:
            size = rng.randint(PAGE_BYTES, size - 1)  # odd counts, inside a page
        scratch = map_bytes(len(buffers[0]))
        count = min(real(descriptor, [writable(scratch)], offset), size)
        buffers[0][:count] = writable(scratch)[:count]
        return count

    file = ImageFile(image)
    monkeypatch.setattr(os, "preadv", short)
    finishes(lambda: _equals(read(file, PAGES), image.read_bytes()))
    file.close()


def _equals(found: bytes, expected: bytes) -> None:
    assert found == expected


def test_reads_of_less_than_a_page_get_on(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct(monkeypatch)
    file, real, calls = ImageFile(image), os.preadv, 0

    def tiny(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 100 * PAGES:
            raise AssertionError("no progress")
        return real(descriptor, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", tiny)
    assert read(file, PAGES) == image.read_bytes()


@pytest.mark.parametrize("first", [0, 3, PAGES - 1])
def test_an_image_that_ends_early_is_refused(image: Path, way: str, first: int) -> None:
    file = ImageFile(image)
    with pytest.raises(StoreError, match=r"image ends at byte 36864, \d+ were expected: prepare"):
        read(file, PAGES + 1 - first, first)
    os.truncate(image, PAGE_BYTES)
    with pytest.raises(StoreError, match="image ends at byte"):
        read(file, PAGES - first, first)
    file.close()


def test_an_image_that_ends_inside_a_page_is_refused(
    image: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real, calls = ImageFile(image), os.preadv, 0
    os.truncate(image, 2 * PAGE_BYTES + 777)

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 100:
            raise AssertionError("no progress")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    with pytest.raises(StoreError, match="image ends at byte"):
        read(file, PAGES)


def test_a_failing_device_is_named_with_the_place(
    image: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ImageFile(image)

    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(StoreError, match=r"image: reading at byte 8192 failed: Input/output error"):
        read(file, 2, 2)
    file.close()


def test_a_device_that_fails_after_a_part_is_refused_too(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, real, calls = ImageFile(image), os.preadv, 0

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, [buffers[0][: 2 * PAGE_BYTES]], offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(StoreError, match="at byte 8192 failed"):
        read(file, PAGES)
    file.close()


def test_a_file_system_that_opens_but_fails_direct_reads_falls_back(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, direct = os.preadv, os.open(image, os.O_RDONLY)
    os.close(direct)

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        import fcntl

        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    file = ImageFile(image)
    assert not file.direct
    assert file.refusal
    assert read(file, PAGES) == image.read_bytes()
    file.close()


def test_a_system_without_direct_reads_falls_back(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    file = ImageFile(image)
    assert not file.direct
    assert "O_DIRECT" in file.refusal
    assert read(file, PAGES) == image.read_bytes()
    file.close()


def test_other_failures_to_open_are_no_fallback(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: Any) -> int:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(StoreError, match=r"image cannot be opened \(Permission denied\): prepare"):
        ImageFile(image)


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm here")
def test_memory_file_systems_work() -> None:
    path = SHARED_MEMORY / f"subspec-test-{os.getpid()}"
    content = random.Random(1).randbytes(PAGES * PAGE_BYTES)
    try:
        path.write_bytes(content)
        file = ImageFile(path)
        assert file.direct == (not file.refusal)
        assert read(file, PAGES) == content
        file.close()
    finally:
        path.unlink()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nothing cannot be opened"):
        ImageFile(tmp_path / "nothing")


def test_reading_a_closed_file_is_an_error_and_closing_twice_is_not(image: Path) -> None:
    file = ImageFile(image)
    file.close()
    file.close()
    with pytest.raises(StoreError, match="image"):
        read(file, 1)


def test_many_threads_may_read_one_file(image: Path) -> None:
    content, file = image.read_bytes(), ImageFile(image)
    failures: list[int] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(50):
            page = rng.randrange(PAGES)
            if read(file, 1, page) != content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]:
                failures.append(page)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()
    assert not failures


def test_direct_reads_says_why_not_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    possible, reason = direct_reads(tmp_path)
    assert possible == (reason == "")
    refuse_direct(monkeypatch)
    possible, reason = direct_reads(tmp_path)
    assert not possible
    assert "O_DIRECT" in reason
    assert not list(tmp_path.iterdir())
    possible, reason = direct_reads(tmp_path / "nowhere")
    assert not possible
    assert "nowhere is not writable" in reason


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("total_pages", [1, 5, 40])
def test_measuring_reads_at_least_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, total_pages: int
) -> None:
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(bytes(5 * PAGE_BYTES))
    seen: list[tuple[Path, int, int]] = []
    real = ImageFile.read

    def noted(self: ImageFile, target: memoryview, offset: int) -> None:
        seen.append((self.path, offset, len(target)))
        real(self, target, offset)

    monkeypatch.setattr(ImageFile, "read", noted)
    speed = measure_read(paths, threads, 2 * PAGE_BYTES, total_pages * PAGE_BYTES)
    assert speed.bytes_per_s > 0
    read_bytes = sum(size for _, _, size in seen)
    assert total_pages * PAGE_BYTES <= read_bytes < (total_pages + 2) * PAGE_BYTES
    for _, offset, size in seen:
        assert offset % PAGE_BYTES == size % PAGE_BYTES == 0
        assert offset + size <= 5 * PAGE_BYTES


def test_measuring_says_whether_the_cache_took_part(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct(monkeypatch)
    assert not measure_read([image], 2, PAGE_BYTES, PAGES * PAGE_BYTES).direct


def test_measuring_nothing_or_a_broken_device_is_an_error(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for paths in ([], [empty]):
        with pytest.raises(StoreError, match="nothing|no image"):
            measure_read(paths, 2, PAGE_BYTES, PAGE_BYTES)

    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(StoreError, match="Input/output error"):
        measure_read([image], 2, PAGE_BYTES, PAGES * PAGE_BYTES)


def test_dropping_from_the_cache_never_fails(image: Path, tmp_path: Path) -> None:
    drop_cached(image)
    drop_cached(tmp_path / "nothing")
    assert len(image.read_bytes()) == PAGES * PAGE_BYTES


def test_views_write_through() -> None:
    buffer = torch.zeros(4, dtype=torch.uint8)
    writable(buffer)[1:3] = b"\x05\x06"
    assert buffer.tolist() == [0, 5, 6, 0]
