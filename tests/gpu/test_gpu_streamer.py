"""The slot ring on a device that dawdles: every byte is there when compute reads it."""

import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from slow import SlowBackend

from subspec.memory.disk import ImageFile
from subspec.memory.pinned import CudaRegistrar, PinnedArena
from subspec.memory.streamer import STAGING_BUFFERS, THREADS, Streamer, Unit
from subspec.memory.tiers import MIB, MemoryBudget

pytestmark = pytest.mark.gpu
UNITS, UNIT_BYTES, REQUEST_BYTES, SWEEPS = 5, 1 << 20, 1 << 18, 3


@pytest.fixture
def arena() -> Iterator[PinnedArena]:
    arena = PinnedArena(MemoryBudget(64 * MIB), CudaRegistrar())
    yield arena
    torch.cuda.synchronize()
    arena.close()


def units(folder: Path, arena: PinnedArena, resting: set[int]) -> list[Unit]:
    """Files of random bytes; some of them rest in pinned memory."""
    made = []
    for index in range(UNITS):
        data = torch.randint(0, 256, (UNIT_BYTES,), dtype=torch.uint8)
        path = folder / f"{index}.exact"
        path.write_bytes(data.numpy().tobytes())
        image = arena.bytes("images", UNIT_BYTES).copy_(data) if index in resting else None
        made.append(Unit(path.name, ImageFile(path), UNIT_BYTES, zlib.crc32(data.numpy().tobytes()), image))
    return made


@pytest.mark.parametrize("resting", [set(range(UNITS)), {1, 3}, set[int]()], ids=["ram", "both", "disk"])
@pytest.mark.parametrize("slow", ["copies", "work", "neither"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_compute_reads_whole_units(
    tmp_path: Path, arena: PinnedArena, resting: set[int], slow: str, count: int
) -> None:
    backend = SlowBackend(copies=slow == "copies", work=slow == "work")
    made = units(tmp_path, arena, resting)
    slots = [torch.zeros(UNIT_BYTES, dtype=torch.uint8, device="cuda") for _ in range(count)]
    seen = [torch.zeros(UNIT_BYTES, dtype=torch.uint8, device="cuda") for _ in range(SWEEPS * UNITS)]
    torch.cuda.synchronize()
    staging = [arena.bytes("staging", REQUEST_BYTES) for _ in range(THREADS * STAGING_BUFFERS)]
    arena.pin()
    streamer = Streamer(made, slots, backend, staging=staging, request_bytes=REQUEST_BYTES)
    for target in seen:
        slot = streamer.acquire()
        backend.launch(backend.compute, partial(target.copy_, slot))
        streamer.release()
    streamer.close()
    backend.close()
    for number, target in enumerate(seen):
        assert zlib.crc32(target.cpu().numpy().tobytes()) == made[number % UNITS].crc32, f"load {number}"
    for unit in made:
        unit.file.close()
