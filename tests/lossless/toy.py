"""A toy that the real streamer, schedule and exchange run: a layer folds the bytes of its slot into a number.

So a byte that is missing, stale or spoilt, and a unit out of turn, change the result.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from subspec.errors import StoreError
from subspec.memory.backend import Backend
from subspec.memory.disk import ImageFile
from subspec.memory.exchange import Exchange
from subspec.memory.schedule import Schedule, Step
from subspec.memory.streamer import STAGING_BUFFERS, Streamer, Unit

PART = 32  # bytes of a read
MASK = (1 << 64) - 1
ODD = torch.arange(1, 64, 2) * 0x9E3779B97F4A7C1  # what the words of a slot are multiplied with


class MemoryFile(ImageFile):
    """A file that is in memory, and can fail."""

    def __init__(self, name: str, content: bytes) -> None:
        self.path, self.content, self.failing = Path(name), content, False

    def read(self, target: memoryview, offset: int) -> None:
        if self.failing:
            raise StoreError(f"{self.path} failed")
        target[:] = self.content[offset : offset + len(target)]


HOW = ("released", "launched", "acquired", "arrived")  # what was last done with, or seen of, a broken sweep
Act = str | tuple[int, str]


@dataclass(frozen=True)
class Case:
    """A toy, and what is done with it.

    Attributes:
        slots: how many; ``units``: parts of each; ``images``: which units lie in host memory.
        staged: whether readers fill staging buffers, or slots.
        acts: "sweep"; "fail": a sweep with a file that cannot be read; or sweeps that are broken off after so
            many units: (units, how).
        threads: readers; ``paranoid``: whether they sum what was summed before.
        sends: to the device, before a sweep; the exchange holds two at once.
    """

    slots: int
    units: tuple[int, ...]
    images: tuple[bool, ...]
    staged: bool
    acts: tuple[Act, ...]
    threads: int = 2
    paranoid: bool = False
    sends: int = 3


def drawn(seed: int) -> Case:
    """A random case that ends with a sweep."""
    rng = random.Random(seed)
    n_units = rng.randint(1, 4)
    broken = rng.randint(0, n_units), rng.choice(HOW)
    choices: list[Act] = ["sweep", "fail", broken, broken]
    acts = rng.choices(choices, k=rng.choice([1] * 7 + [2]))
    images = rng.choice([(True,) * n_units, (False,) * n_units, tuple(rng.choices([True, False], k=n_units))])
    return Case(
        slots=rng.randint(1, 4),
        units=tuple(rng.choice([1, 1, 2, 3]) for _ in range(n_units)),
        images=images,
        staged=rng.random() < 0.7,
        acts=(*acts, "sweep"),
        threads=rng.randint(1, 2),
        paranoid=rng.random() < 0.3,
        sends=rng.choice([0] * 7 + [3]),
    )


def digest(values: torch.Tensor) -> int:
    """What a layer adds for some bytes."""
    words = values.view(torch.int64)
    return int((words * ODD[: len(words)]).sum()) & MASK


@dataclass
class Toy:
    """The toy on a backend; ``expected`` follows what it was given to do."""

    case: Case
    backend: Backend
    expected: int = 0
    state: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    draft: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    rows: torch.Tensor = field(default_factory=lambda: torch.zeros(8, dtype=torch.int64))

    def __post_init__(self) -> None:
        case, rng = self.case, random.Random(repr(self.case))
        contents = [rng.randbytes(parts * PART) for parts in case.units]
        self.files = [MemoryFile(f"unit{index}", content) for index, content in enumerate(contents)]
        loaded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
        self.digests = [digest(one) for one in loaded]
        units = [
            Unit(f"unit{index}", file, len(file.content), zlib.crc32(file.content), one if image else None)
            for index, (file, one, image) in enumerate(zip(self.files, loaded, case.images, strict=True))
        ]
        n_bytes = max(case.units) * PART
        n_buffers = STAGING_BUFFERS * case.threads if case.staged else 0
        self.streamer = Streamer(
            units,
            [torch.zeros(n_bytes, dtype=torch.uint8) for _ in range(case.slots)],
            self.backend,
            staging=[torch.zeros(PART, dtype=torch.uint8) for _ in range(n_buffers)],
            threads=case.threads,
            request_bytes=PART,
            paranoid=case.paranoid,
        )
        self.schedule = Schedule(self.backend, self.streamer)
        buffers = [torch.zeros(128, dtype=torch.uint8) for _ in range(2)]
        self.exchange = Exchange(self.backend, *buffers)

    def fold(self, values: torch.Tensor) -> None:
        """A layer's work on the device."""
        words = values.view(torch.int64)
        self.state.mul_(3).add_((words * ODD[: len(words)]).sum())

    def folded(self, value: int) -> None:
        """What that makes of the expected state."""
        self.expected = (self.expected * 3 + value) & MASK

    def steps(self) -> Iterator[Step]:
        """Each unit's layer; the schedule asks for the next one after it was launched."""

        def work(slot: torch.Tensor | None) -> None:
            assert slot is not None
            self.fold(slot)

        for index, value in enumerate(self.digests):
            yield Step(f"layer {index}", work, streamed=True, writes=(self.state,))
            self.folded(value)

    def gap(self, left: list[int]) -> bool:
        """A little drafting, while there is some left."""
        self.backend.launch(self.backend.compute, lambda: self.draft.add_(self.state), writes=[self.draft])
        left.append(0)
        return len(left) < 4

    def send(self) -> None:
        """What the sweep is about: rows, each folded."""
        for number in range(self.case.sends):
            values = torch.arange(number, number + 8)
            self.exchange.send(self.rows, values)
            self.backend.launch(self.backend.compute, partial(self.fold, self.rows), writes=[self.state])
            self.folded(digest(values))

    def sweep(self) -> None:
        """One sweep; its result is looked at once at the end, and once later."""
        self.send()
        before, sent = self.expected, self.exchange.begin_read(self.state)
        self.schedule.sweep(self.steps(), partial(self.gap, []))
        assert int(self.exchange.read(self.state)) & MASK == self.expected
        assert int(self.exchange.take(sent)) & MASK == before

    def break_off(self, units: int, how: str) -> None:
        """Some units of a sweep, the last of them perhaps not to its end."""
        self.streamer.rewind()
        for index in range(units):
            slot, last = self.streamer.acquire(), index == units - 1
            if last and how == "acquired":
                return
            work = partial(self.fold, slot)
            self.backend.launch(self.backend.compute, work, reads=[slot], writes=[self.state])
            self.folded(self.digests[index])
            if last and how == "launched":
                return
            self.streamer.release()
        while how == "arrived" and not self.streamer.ready():
            pass

    def fail(self) -> None:
        """A sweep while one file cannot be read: it may have been read ahead of that."""
        self.files[-1].failing = True
        try:
            self.schedule.sweep(self.steps())
        except StoreError as error:
            assert "failed" in str(error)  # noqa: PT017 - that there is one depends on the order
        self.files[-1].failing = False

    def run(self) -> None:
        """Everything; raises whatever is found."""
        for act in self.case.acts:
            if act == "sweep":
                self.sweep()
            elif act == "fail":
                self.fail()
            else:
                assert isinstance(act, tuple)
                self.break_off(*act)
        self.streamer.close()
        self.backend.close()
