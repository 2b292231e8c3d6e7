"""Which way a CUDA device multiplies with substitutes: tried at start-up, on the model's own shapes.

Every way that fits is first compared with the reference, the first of them: one whose numbers are wrong, or
that fails, is out, whatever its speed.  Those that are left are timed in turns, and one is taken for all
matrices: the fastest over a draft pass of each row count.  ``Choice.describe`` says what became of each.

How time is taken is handed in.  Knows nothing of stores, plans, or how the ways work.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from subspec.substitute.device_products import Gemlite, Product, Tiles, TorchInt4, Way
from subspec.substitute.layout import groups, pack

T = TypeVar("T")
Timer = Callable[[Callable[[], object]], Callable[[], float]]  # of work: runs it once, returns its seconds
ROWS = (1, 2, 4, 8, 16)  # of draft passes
TOLERANCE = 0.06  # of the results' root mean square: one rounding to bf16 is at most 0.02 of it
ADVANTAGE = 0.03  # of the time, that another way must save
_ROUNDS = 7
_FLUSH_BYTES = 256 << 20  # more than any device's cache: a draft's weights come from its memory


@dataclass(frozen=True)
class Shape:
    """``count`` matrices of n output features and k input features."""

    n: int
    k: int
    count: int


@dataclass(frozen=True)
class Choice:
    """A way for all matrices of a model.

    Attributes:
        way: the one taken.
        seconds: for each way that was timed, of all products of one draft pass of each of ``ROWS``.
        rejected: for each way that could not be taken, why.
    """

    way: Way
    seconds: Mapping[str, float] = field(default_factory=dict)
    rejected: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The same as plain data."""
        return {"name": self.way.name, "seconds": dict(self.seconds), "rejected": dict(self.rejected)}


def choose_on(
    device: torch.device, shapes: Sequence[Shape], dtype: torch.dtype, *, tiles_kept: bool
) -> Choice:
    """The choice on a CUDA device; takes memory there for some copies of the largest shape meanwhile.

    Args:
        device: where the products are computed.
        shapes: of the model's matrices.
        dtype: of the activations.
        tiles_kept: whether something else needs the tiles, too: then there is no choice.
    """
    reference = Tiles()
    others: list[Way] = [TorchInt4((0, 0)), Gemlite()]
    if tiles_kept or device.type != "cuda" or not torch.cuda.is_available():
        why = (
            "would replace what exact weights are rebuilt from"
            if tiles_kept
            else "was not tried: no CUDA device"
        )
        return Choice(reference, rejected={way.name: why for way in others})
    ways: list[Way] = [reference, TorchInt4(torch.cuda.get_device_capability(device)), Gemlite()]
    with torch.cuda.device(device):
        chosen = choose(ways, shapes, dtype, device, cuda_timer(device))
    torch.cuda.empty_cache()  # what the trial took, others may want in other sizes
    return chosen


def choose(
    ways: Sequence[Way], shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, timer: Timer
) -> Choice:
    """Try ways, the first of them the reference, and take the fastest right one.

    Args:
        ways: of distinct names; the first takes every shape.
        shapes: of the model's matrices.
        dtype: of the activations.
        device: where to try.
        timer: prepares work that runs on the device, once it has run there before.
    """
    reference, others = ways[0], ways[1:]
    found = {
        way.name: [why for each in shapes if (why := way.misfit(each.n, each.k, dtype))] for way in others
    }
    misfits = {name: reasons[0] for name, reasons in found.items() if reasons}
    trial = _Trial(reference, [way for way in others if way.name not in misfits], dtype, device, timer)
    try:
        for shape in shapes:
            if trial.others:
                trial.shape(shape)
    except Exception as error:  # noqa: BLE001 - not tried then; its first use will tell what ails it
        why = f"could not be compared: {_first_line(error)}"
        return Choice(
            reference, rejected={**misfits, **trial.rejected, **{way.name: why for way in trial.others}}
        )
    seconds = {way.name: trial.seconds[way.name] for way in (reference, *trial.others) if trial.others}
    name = fastest(seconds, reference.name)
    return Choice(next(way for way in ways if way.name == name), seconds, {**misfits, **trial.rejected})


def fastest(seconds: Mapping[str, float], reference: str) -> str:
    """The way of the least seconds; the reference, unless another one saves more than ``ADVANTAGE``."""
    if reference not in seconds:
        return reference
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] < seconds[reference] * (1 - ADVANTAGE) else reference


def cuda_timer(device: torch.device) -> Timer:
    """Seconds on the device, by its events: of a captured graph, with none of its data in the cache."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def prepare(work: Callable[[], object]) -> Callable[[], float]:
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                work()
            finally:
                graph.capture_end()

        def once() -> float:
            with torch.cuda.stream(stream):
                # What fills the cache takes long enough for the host to enqueue the rest behind it.
                torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device).zero_()
                start.record()
                graph.replay()
                end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000

        return once

    return prepare


class _Trial:
    """What is left of the ways, shape after shape.

    Args:
        reference: what the others are compared with; its failures are the caller's.
        others: the ways to try.
        dtype, device, timer: as for ``choose``.

    Attributes:
        others: those not rejected yet; ``rejected``: why the rest is out.
        seconds: of each so far.
    """

    def __init__(
        self, reference: Way, others: Sequence[Way], dtype: torch.dtype, device: torch.device, timer: Timer
    ) -> None:
        self._reference, self.others = reference, list(others)
        self.rejected: dict[str, str] = {}
        self.seconds = {way.name: 0.0 for way in (reference, *others)}
        self._dtype, self._device, self._timer = dtype, device, timer

    def shape(self, shape: Shape) -> None:
        """Compare and time all ways on random weights of a shape; a way that is wrong or fails is out."""
        generator = torch.Generator(self._device).manual_seed(shape.n * 31 + shape.k)
        tiles = _random_tiles(shape, self._device, generator)
        x = torch.randn(max(ROWS), shape.k, device=self._device, generator=generator).to(self._dtype)
        bias = torch.randn(shape.n, device=self._device, generator=generator).to(self._dtype)

        def packed(way: Way) -> Product:
            return way.pack(tiles.clone(), shape.n, shape.k, self._dtype)

        reference = packed(self._reference)
        expected = self._results(reference, x, bias)
        products = {self._reference.name: reference}
        for way in list(self.others):
            product = self._attempt(way, partial(packed, way))
            if product is not None:
                products[way.name] = product
                self._attempt(way, partial(self._compare, way, product, expected, x, bias))
        for rows in ROWS:
            self._time(shape, products, x[:rows])

    def _results(self, product: Product, x: Tensor, bias: Tensor) -> list[Tensor]:
        """For each row count, without and with bias; NaN where nothing was written."""
        results = []
        for rows in ROWS:
            for added in (None, bias):
                results.append(x.new_full((rows, len(bias)), torch.nan))
                product(x[:rows], added, results[-1])
        return results

    def _compare(self, way: Way, product: Product, expected: list[Tensor], x: Tensor, bias: Tensor) -> None:
        """Reject a way whose results are not the reference's."""
        for right, found in zip(expected, self._results(product, x, bias), strict=True):
            off = difference(found, right)
            if not off <= TOLERANCE:  # a NaN is not, either
                rows, n = right.shape
                self._reject(
                    way,
                    f"is wrong: {rows} rows by {n} x {x.shape[1]} are off by {off:.2g} of their size, above "
                    f"{TOLERANCE}",
                )
                return

    def _time(self, shape: Shape, products: Mapping[str, Product], x: Tensor) -> None:
        """Add the times of one row count, taken in turns."""
        ways, watches, samples = [self._reference, *self.others], {}, defaultdict(list)
        for way in ways:
            work = partial(products[way.name], x, None, x.new_empty(len(x), shape.n))
            watches[way.name] = self._attempt(way, partial(self._timer, work))
        for _ in range(_ROUNDS):
            for way in ways:
                watch = watches[way.name]
                if watch is not None and (taken := self._attempt(way, watch)) is not None:
                    samples[way.name].append(taken)
        for name, times in samples.items():
            self.seconds[name] += statistics.median(times) * shape.count

    def _attempt(self, way: Way, work: Callable[[], T]) -> T | None:
        """What work returns; None if the way is out, or by now."""
        if way.name in self.rejected:
            return None
        try:
            return work()
        except Exception as error:  # whatever a foreign kernel raises, the reference goes on
            if way is self._reference:
                raise
            self._reject(way, f"fails: {_first_line(error)}")
            return None

    def _reject(self, way: Way, reason: str) -> None:
        """Go on without a way."""
        self.others.remove(way)
        self.rejected[way.name] = reason


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, by the root mean square of what is expected: NaN if anything is not finite."""
    spread = expected.float().square().mean().sqrt()
    return float((found.float() - expected.float()).abs().max() / spread)


def _random_tiles(shape: Shape, device: torch.device, generator: torch.Generator) -> Tensor:
    """A substitute of weights whose mids and scales differ from group to group and matter alike."""
    size = (shape.n, groups(shape.k))
    codes = torch.randint(16, (shape.n, shape.k), dtype=torch.uint8, device=device, generator=generator)
    scales = 0.005 + 0.01 * torch.rand(size, device=device, generator=generator)
    mids = 0.05 * torch.randn(size, device=device, generator=generator)
    return pack(codes, scales.bfloat16(), mids.bfloat16())


def _first_line(error: Exception) -> str:
    """Its kind and the beginning of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".removesuffix(": ")
