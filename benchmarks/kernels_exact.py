"""Speed of the exact kernels beside torch's own, in interleaved runs: ``python benchmarks/kernels_exact.py``.

Prints, for the linear kernel, the best of several runs in GB/s of weights and in GFLOP/s, and the median of
the per-run ratios to ``F.linear``; for attention, the time beside ``scaled_dot_product_attention``.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from subspec.kernels import exact, native

SHAPES = [(17920, 1536), (1536, 8960), (2048, 1536), (30000, 1536)]
ATTENTION = [
    (1, 500, False),
    (1, 4000, False),
    (8, 500, False),
    (8, 4000, False),
    (64, 1000, False),
    (1000, 1000, True),
]
ROWS = [1, 2, 4, 8, 16, 32, 64, 256, 512]


def interleave(calls: list[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each call, run in turn."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for times, call in zip(seconds, calls, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [times[1:] for times in seconds]


def linear(dtype: torch.dtype, outputs: int, length: int, count: int, repeats: int) -> None:
    """One line for a weight shape and a row count."""
    weight = torch.randn(outputs, length).to(dtype)
    x, out = torch.randn(count, length).to(dtype), torch.empty(count, outputs, dtype=dtype)
    ours, torchs = interleave(
        [lambda: exact.linear(x, weight, None, out), lambda: F.linear(x, weight)], repeats
    )
    ratio = statistics.median(b / a for a, b in zip(ours, torchs, strict=True))
    line = f"linear {outputs}x{length} rows {count:4d}: "
    for name, best in (("ours", min(ours)), ("torch", min(torchs))):
        flops = 2 * outputs * length * count / best
        line += f"{name} {weight.nbytes / best / 1e9:5.1f} GB/s {flops / 1e9:5.0f} GFLOP/s  "
    sys.stdout.write(f"{line}ratio {ratio:.2f}\n")


def attention(dtype: torch.dtype, rows: int, keys: int, causal: bool, repeats: int) -> None:
    """One line for a shape of a 1.5B model (12 heads, 2 KV heads of 128)."""
    heads, kv_heads, dim = 12, 2, 128
    q = torch.randn(rows, heads, dim).to(dtype)
    k, v = (torch.randn(kv_heads, keys, dim).to(dtype) for _ in range(2))
    prefix = torch.arange(1, rows + 1) if causal else torch.full((rows,), keys)
    inputs = prefix.int(), torch.zeros(rows, 0).int(), torch.zeros(rows).int()
    swapped = q.transpose(0, 1)[None]

    def ours() -> torch.Tensor:
        return exact.attend(q, k, v, *inputs, dim**-0.5)

    def torchs() -> torch.Tensor:
        return F.scaled_dot_product_attention(swapped, k[None], v[None], is_causal=causal, enable_gqa=True)

    a, b = (min(times) for times in interleave([ours, torchs], repeats))
    flops = 4 * int(prefix.sum()) * heads * dim
    kind = " causal" if causal else ""
    line = f"attend {rows:4d} rows, {keys} keys{kind}: ours {a * 1e3:.3f} ms ({flops / a / 1e9:.0f} GFLOP/s)"
    sys.stdout.write(f"{line}  torch {b * 1e3:.3f} ms\n")


def small(dtype: torch.dtype, repeats: int) -> None:
    """Call times of the small operations at one row: mostly overhead."""
    x, weight, pair = (
        torch.randn(1, 1536).to(dtype),
        torch.randn(1536).to(dtype),
        torch.randn(1, 17920).to(dtype),
    )
    out, gated = torch.empty_like(x), torch.empty(1, 8960, dtype=dtype)
    times = interleave(
        [
            lambda: exact.rms_norm(x, weight, 1e-6, out),
            lambda: exact.silu_mul(pair, gated),
        ],
        repeats * 50,
    )
    for name, seconds in zip(("rms_norm 1x1536", "silu_mul 1x8960"), times, strict=True):
        sys.stdout.write(f"{name}: {statistics.median(seconds) * 1e6:.1f} us\n")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--shapes", type=int, default=2, help="how many of the weight shapes")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    sys.stdout.write(
        f"level {native.kernels().level}, {torch.get_num_threads()} threads, {arguments.dtype}\n"
    )
    for outputs, length in SHAPES[: arguments.shapes]:
        for count in arguments.rows:
            linear(dtype, outputs, length, count, arguments.repeats)
    for rows, keys, causal in ATTENTION:
        attention(dtype, rows, keys, causal, arguments.repeats)
    small(dtype, arguments.repeats)


if __name__ == "__main__":
    main()
