"""Measure the residual codec's kernels at every level this processor can run, and the products they feed.

    python benchmarks/kernels_residual.py [--rounds 15] [--beside LIBRARY] [--out FILE]

``decode``: 10⁹ weights rebuilt a second: on one thread by its processor time, a block of 64 rows at a time
into the same place, as the product does it; on all threads by the clock, the whole matrix.  ``encode``: the
other way.  ``linear``: seconds of an exact product of some rows with a matrix as plain weights and rebuilt
from residuals, in turn.  Medians of the rounds; levels take turns.  It is larger than a core's caches.
``--beside``: a library of another build, whose codec takes its turns too.
"""

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from subspec.bench import machine
from subspec.kernels import build, exact, native
from subspec.kernels.residual import ResidualKernels, residual_kernels
from subspec.substitute.quantize import quantize_tiles
from subspec.substitute.residual import encode

N, K = 17920, 1536  # gate and up of a layer of 1.5 × 10⁹ parameters
BLOCK_ROWS = 64
ROWS = [1, 8, 32, 64]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def decode_all(kernels: ResidualKernels, matrix: "Matrix", block: torch.Tensor) -> None:
    """Rebuild a matrix block by block into the same place."""
    for first in range(0, N, BLOCK_ROWS):
        kernels.decode(matrix.residual, matrix.tiles, N, first, first + BLOCK_ROWS, block)


class Matrix:
    """A random weight in all its forms."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.weight = (torch.randn(N, K) * 0.02).to(dtype)
        self.tiles = quantize_tiles(self.weight)
        self.residual = encode(self.weight, self.tiles)
        self.bits = 8 * len(self.residual) / self.weight.numel()


def seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of a call by a clock."""
    start = clock()
    call()
    return clock() - start


def median_rate(times: list[float]) -> float:
    """10⁹ weights a second."""
    return N * K / statistics.median(times) / 1e9


def codec(matrix: Matrix, rounds: int, threads: int, beside: Path | None) -> dict[str, dict[str, float]]:
    """Rates of every level, and of a library beside them, in turn."""
    libraries = {level: native._load(level)[0] for level in build.levels()}
    if beside is not None:
        libraries[f"beside: {beside.name}"] = ctypes.CDLL(str(beside))
    levels = {level: ResidualKernels(library) for level, library in libraries.items() if library is not None}
    times: dict[str, dict[str, list[float]]] = {
        level: {name: [] for name in ("decode_one_thread", "decode_all_threads", "encode_all_threads")}
        for level in levels
    }
    block = torch.empty(BLOCK_ROWS, K, dtype=matrix.weight.dtype)
    whole = torch.empty_like(matrix.weight)
    for turn in range(rounds):
        for level, kernels in levels.items():
            own = times[level]
            torch.set_num_threads(1)
            own["decode_one_thread"].append(
                seconds(lambda: decode_all(kernels, matrix, block), time.thread_time)  # noqa: B023
            )
            torch.set_num_threads(threads)
            own["decode_all_threads"].append(
                seconds(
                    lambda: kernels.decode(matrix.residual, matrix.tiles, N, 0, N, whole),  # noqa: B023
                    time.perf_counter,
                )
            )
            if turn < 3:
                own["encode_all_threads"].append(
                    seconds(lambda: kernels.encode(matrix.weight, matrix.tiles), time.perf_counter)  # noqa: B023
                )
    return {level: {name: median_rate(each) for name, each in own.items()} for level, own in times.items()}


def products(matrix: Matrix, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of the product by rows, plain and rebuilt in turn, with the best level."""
    kernels = residual_kernels()
    if kernels is None:
        return {}
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, K).to(matrix.weight.dtype)
        plain, rebuilt = [], []
        for _ in range(rounds):
            plain.append(seconds(lambda: exact.linear(x, matrix.weight), time.perf_counter))  # noqa: B023
            rebuilt.append(
                seconds(
                    lambda: kernels.linear(x, matrix.residual, matrix.tiles, N, None),  # noqa: B023
                    time.perf_counter,
                )
            )
        found[str(rows)] = {"plain_s": statistics.median(plain), "rebuilt_s": statistics.median(rebuilt)}
    return found


def main() -> int:
    """Measure, write the result, and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    threads = torch.get_num_threads()
    result: dict[str, Any] = machine.provenance(" ".join(["python", *sys.argv]))
    for name, dtype in DTYPES.items():
        matrix = Matrix(dtype)
        result[name] = {
            "bits_a_weight": matrix.bits,
            "rate_1e9_weights_per_s": codec(matrix, options.rounds, threads, options.beside),
            "linear": products(matrix, options.rounds),
        }
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
