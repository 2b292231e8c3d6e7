"""Measure a whole draft pass beside its products alone and the time that reading the substitutes takes.

    python benchmarks/draft_step.py MODEL --memory SIZE [--rounds 30] [--prefix 200] [--out FILE]

``step_s``: one pass of the draft over some rows behind a prefix, from embeddings to logits.  ``products_s``:
its W4A8 products alone, each with an input of random numbers.  ``read_s_per_byte``: a plain read of memory
that no cache holds (a torch sum), on the same threads.  All three in turn, so that they meet the same
machine; a figure is the fastest tenth of the rounds, since other work on the machine only ever slows them.
``step_of_bound`` is the step over the time of reading the substitutes once, below which no pass can come;
``other_of_step`` is what the step spends beside products.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from subspec import LLM  # before torch: it sets how long threads spin
from subspec.bench import machine
from subspec.engine import Engine
from subspec.memory.arena import map_bytes
from subspec.models.decoder import Rows, prefix_rows
from subspec.store.layout import layer_matrices
from subspec.substitute.layout import tile_bytes
from subspec.substitute.linear import SubstituteLinear

ROWS = [1, 2, 4, 8, 16]
READ_BYTES = 256_000_000


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def fast_tenth(times: list[float]) -> float:
    """The tenth percentile."""
    return sorted(times)[len(times) // 10]


def weights(engine: Engine) -> list[SubstituteLinear]:
    """Every product of a draft pass in order, over the engine's own substitutes."""
    layers = [
        SubstituteLinear(matrix.own_tiles(unit.tiles), matrix.n, matrix.k)
        for unit in engine.weights.layers
        for matrix in layer_matrices(engine.config)
    ]
    return [*layers, engine.weights.draft_head]


def run_all(products: list[SubstituteLinear], inputs: dict[int, Any]) -> None:
    """Multiply by each in turn."""
    for product in products:
        product(inputs[product.k])


def measure(engine: Engine, prefix: int, rounds: int) -> dict[str, Any]:
    """Times of all, in turn."""
    import torch

    products = weights(engine)
    substitute_bytes = sum(tile_bytes(each.n, each.k) for each in products)
    room = map_bytes(READ_BYTES).view(torch.int64).fill_(1)  # mapped as the substitutes are
    engine.target(prefix_rows([1000 + i for i in range(prefix)], 0), last_only=True)
    places: dict[int, Rows] = {rows: prefix_rows([7] * rows, prefix) for rows in ROWS}
    sizes = {each.k for each in products}
    inputs = {rows: {k: torch.randn(rows, k).to(engine.store.dtype) for k in sizes} for rows in ROWS}
    reads: list[float] = []
    steps: dict[int, list[float]] = {rows: [] for rows in ROWS}
    alone: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(rounds):
        for rows in ROWS:
            reads.append(timed(room.sum) / READ_BYTES)
            steps[rows].append(timed(partial(engine.draft, places[rows])))
            alone[rows].append(timed(partial(run_all, products, inputs[rows])))
    read_s_per_byte = fast_tenth(reads)
    bound_s = substitute_bytes * read_s_per_byte
    step_s = {rows: fast_tenth(times) for rows, times in steps.items()}
    products_s = {rows: fast_tenth(times) for rows, times in alone.items()}
    return {
        "prefix": prefix,
        "substitute_bytes": substitute_bytes,
        "read_gb_s": 1e-9 / read_s_per_byte,
        "bound_s": bound_s,
        "step_s": step_s,
        "products_s": products_s,
        "step_of_bound": {rows: each / bound_s for rows, each in step_s.items()},
        "other_of_step": {rows: 1 - products_s[rows] / each for rows, each in step_s.items()},
        "raw": {"read_s_per_byte": reads, "step_s": steps, "products_s": alone},
    }


def main() -> int:
    """Measure, write the result, and print it without the single times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--memory", required=True)
    parser.add_argument("--prefix", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with LLM(options.model, options.memory) as llm:
        result = {
            **machine.provenance(" ".join(["python", *sys.argv])),
            "model": Path(options.model).name,
            **measure(llm.engine, options.prefix, options.rounds),
        }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps({key: each for key, each in result.items() if key != "raw"}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
