"""Measure the substitutes' kernels: products from cold memory, quantization, the cost of a call.

    python benchmarks/kernels_substitute.py [--threads 2] [--seconds 1.0] [--json FILE]

Products cycle through more weights than any cache holds.  Beside them stands the bandwidth of a plain read
(a torch sum over the same memory), measured in turn with them; a figure is the fastest tenth of many
short bursts, since other work on the machine only ever slows them.  ``SUBSPEC_KERNELS`` chooses the level.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspec.kernels.native import kernels
from subspec.memory.arena import map_bytes
from subspec.substitute.layout import tile_bytes
from subspec.substitute.linear import SubstituteLinear
from subspec.substitute.quantize import quantize_tiles

SHAPES = [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960), (151936, 1536)]
ROWS = [1, 2, 4, 6, 8, 16, 32, 64]
POOL_BYTES = 640_000_000
BURST_BYTES = 16_000_000


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call; processor time where there is one thread, so that other work does not count."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def run_all(layers: list[SubstituteLinear], x: Tensor) -> None:
    """Multiply by each layer in turn."""
    for layer in layers:
        layer(x)


def plain_read(pool: Tensor, turn: int) -> float:
    """Seconds per byte of reading part of the pool."""
    words = pool.view(torch.int64)
    count = BURST_BYTES // 8
    start = turn * count % (len(words) - count)
    return timed(words[start : start + count].sum) / BURST_BYTES


def products(n: int, k: int, pool: Tensor, seconds: float) -> dict[str, Any]:
    """Times of one shape's products, rows in turn, with plain reads between them."""
    size = tile_bytes(n, k)
    layers = [SubstituteLinear(pool[i * size : (i + 1) * size], n, k) for i in range(len(pool) // size)]
    inputs = {rows: torch.randn(rows, k).bfloat16() for rows in ROWS}
    times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    reads: list[float] = []
    repeats, turn = max(1, BURST_BYTES // size), 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(reads) < 3:
        reads.append(plain_read(pool, len(reads)))
        for rows, x in inputs.items():
            burst = [layers[(turn + i) % len(layers)] for i in range(repeats)]
            turn += repeats
            times[rows].append(timed(partial(run_all, burst, x)) / repeats)
    best = {rows: fast_tenth(each) for rows, each in times.items()}
    read_s = fast_tenth(reads)
    return {
        "shape": [n, k],
        "read_gb_s": 1e-9 / read_s,
        "weights_per_s": {rows: n * k / each for rows, each in best.items()},
        "of_plain_read": {rows: size * read_s / each for rows, each in best.items()},
        "of_one_row": {rows: best[1] / each for rows, each in best.items()},
    }


def call_cost() -> float:
    """Seconds of a product too small to take time."""
    layer = SubstituteLinear(quantize_tiles(torch.randn(16, 64)), 16, 64)
    x = torch.randn(1, 64).bfloat16()
    return min(timed(lambda: [layer(x) for _ in range(1000)]) / 1000 for _ in range(10))


def quantization() -> dict[str, float]:
    """Weights quantized per second, by dtype."""
    weight = torch.randn(4096, 1536) * 0.02
    rates = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        part = weight.to(dtype)
        rates[str(dtype)] = weight.numel() / min(timed(partial(quantize_tiles, part)) for _ in range(5))
    return rates


def fast_tenth(times: list[float]) -> float:
    """The tenth percentile."""
    return sorted(times)[len(times) // 10]


def main() -> None:
    """Measure, print, and write the figures if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="per shape")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    say = sys.stdout.write
    result: dict[str, object] = {
        "command": sys.argv, "machine": platform.processor() or platform.machine(), "torch":
        torch.__version__, "level": kernels().level, "threads": options.threads,
    }  # fmt: skip
    say(f"level {kernels().level}, {options.threads} threads\n")
    result["call_us"] = call_cost() * 1e6
    say(f"a call: {result['call_us']:.1f} us\n")
    result["quantize"] = rates = quantization()
    for name, rate in rates.items():
        say(f"quantize {name}: {rate / 1e6:.0f} M weights/s\n")
    pool = map_bytes(POOL_BYTES)  # as the engine's memory is
    pool.view(torch.int32).fill_(0x3C123C34)  # ordinary numbers when read as scales and mids
    shapes = []
    for n, k in SHAPES:
        figures = products(n, k, pool, options.seconds)
        shapes.append(figures)
        say(f"{n} x {k}: read {figures['read_gb_s']:.1f} GB/s; 10^9 weights/s (of plain read, of one row)\n")
        for rows in ROWS:
            rate, read, one = (
                figures[name][rows] for name in ("weights_per_s", "of_plain_read", "of_one_row")
            )
            say(f"  {rows:3} rows  {rate / 1e9:6.1f}  {read:5.0%}  {one:5.0%}\n")
    result["shapes"] = shapes
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
