"""How many bits a weight residuals take, of every matrix of prepared models, and whether all come back.

    python benchmarks/residual_density.py STORE [STORE ...] [--out FILE]

A model's figures: ``stored``: bits a weight of its residual images as files, all counted (directories,
headers, padding); ``raw_entropy``: order-0 entropy of the weights' bit patterns, what a coder without
substitutes could reach; ``bound``: the mean of log2(scale / spacing of the dtype at the weight), what a
weight takes on average if weights are spread evenly within their bins; ``different``: tensors whose SHA-256
is not the checkpoint's.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from subspec.bench import machine
from subspec.store.exact import load_chunk, load_layer, read_image
from subspec.store.layout import head_chunks, head_file, layer_file, layer_matrices
from subspec.store.reader import Store
from subspec.store.verify import verify
from subspec.substitute.layout import GROUP, tile_bytes, unpack

FRACTION_BITS = {torch.bfloat16: 7, torch.float16: 10}
OCTAVES = 9  # below the scale, where the bound stops counting: fewer than one weight in a thousand


def needed_bits(weight: torch.Tensor, tiles: torch.Tensor) -> float:
    """Sum over a weight (N, K) of log2(scale / spacing)."""
    n, k = weight.shape
    _, scales, _ = unpack(tiles, n, k)
    scale = scales.float().repeat_interleave(GROUP, dim=1)[:, :k]
    exponent = torch.frexp(weight.float()).exponent.clamp(min=torch.frexp(scale).exponent - OCTAVES)
    bits = torch.log2(scale) - (exponent - 1 - FRACTION_BITS[weight.dtype])
    return float(bits[scale > 0].clamp(min=0).sum(dtype=torch.float64))


def measure(directory: Path) -> dict[str, Any]:
    """The figures of one store."""
    store = Store(directory)
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    weights, needed = 0, 0.0

    def add(weight: torch.Tensor, tiles: torch.Tensor) -> None:
        nonlocal counts, weights, needed
        counts += torch.bincount(weight.flatten().view(torch.int16).int() & 0xFFFF, minlength=1 << 16)
        weights += weight.numel()
        needed += needed_bits(weight, tiles)

    matrices = layer_matrices(store.config)
    for index in range(store.config.layers):
        tiles = read_image(store, layer_file(index, "substitute"))
        for matrix, weight in zip(matrices, load_layer(store, index), strict=True):
            add(weight, matrix.own_tiles(tiles))
    for index, chunk in enumerate(head_chunks(store.config, store.dtype.itemsize)):
        tiles = read_image(store, head_file(index, "substitute"))
        add(load_chunk(store, index), tiles[: tile_bytes(chunk.stop - chunk.start, store.config.hidden_size)])
    shares = counts[counts > 0].double() / weights
    files = store.manifest.files
    streamed = sum(path.stat().st_size for path in store.images())
    whole = sum(record.n_bytes for name, record in files.items() if not name.startswith("tokenizer/"))
    checkpoint = sum(2 * torch.Size(shape).numel() for shape in store.config.tensors().values())
    findings = list(verify(directory))
    store.close()
    return {
        "name": store.manifest.name,
        "dtype": store.manifest.dtype,
        "weights": weights,
        "raw": 16.0,
        "raw_entropy": float(-(shares * shares.log2()).sum()),
        "stored": 8 * streamed / weights,
        "bound": needed / weights,
        "store_bytes": whole,
        "checkpoint_bytes": checkpoint,
        "store_over_checkpoint": whole / checkpoint,
        "tensors": len(findings),
        "different": sum(not finding.good for finding in findings),
        "compared_with": sorted({finding.source for finding in findings}),
    }


def main() -> int:
    """Measure, write the result, and print a table of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    models = [measure(store) for store in options.stores]
    record = {**machine.provenance(" ".join(["python", *sys.argv])), "models": models}
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    say = sys.stdout.write
    say("| model | weights | raw | entropy | stored | bound | store / checkpoint | tensors | different |\n")
    say("|---|---|---|---|---|---|---|---|---|\n")
    for one in models:
        cells = [
            one["name"],
            f"{one['weights'] / 1e9:.2f} × 10⁹",
            *(
                f"{one[name]:.2f}"
                for name in ("raw", "raw_entropy", "stored", "bound", "store_over_checkpoint")
            ),
            *(str(one[name]) for name in ("tensors", "different")),
        ]
        say("| " + " | ".join(cells) + " |\n")
    return int(any(one["different"] for one in models))


if __name__ == "__main__":
    sys.exit(main())
