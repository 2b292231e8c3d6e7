"""Time the prefill of a long prompt against a sweep, and against the same products through stock torch.

    python benchmarks/prefill.py MODEL --memory SIZE [--tokens 1000] [--runs 3] [--out FILE]

The three are interleaved.  ``sweep_s`` is a plain decoding step (one row); ``torch_s`` is ``F.linear`` over
the model's weight shapes with as many rows as the prompt has, on one layer's random weights, times the
layers, plus the head for one row.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from subspec import LLM, SamplingParams
from subspec.bench import machine
from subspec.memory.tiers import peak_memory_bytes
from subspec.store.layout import layer_matrices


def torch_products_s(llm: LLM, tokens: int) -> float:
    """Seconds that torch takes for the linear products of a prompt."""
    config, dtype = llm.config, llm.engine.store.dtype
    total_s = 0.0
    for matrix in layer_matrices(config):
        weight = torch.randn(matrix.n, matrix.k).to(dtype)
        x = torch.randn(tokens, matrix.k).to(dtype)
        F.linear(x, weight)
        start = time.perf_counter()
        F.linear(x, weight)
        total_s += config.layers * (time.perf_counter() - start)
    return total_s


def main() -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--memory", required=True)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with LLM(options.model, options.memory) as llm:
        prompt = [(7 * index) % llm.config.vocab_size for index in range(options.tokens)]
        runs = []
        for _ in range(options.runs):
            llm.reset()
            result = llm.generate(prompt, SamplingParams(max_new_tokens=3, ignore_eos=True), mode="plain")
            figures = result.statistics
            runs.append(
                {
                    "prefill_s": figures.prefill_s,
                    "sweep_s": figures.decode_s / figures.steps,
                    "torch_s": torch_products_s(llm, options.tokens),
                }
            )
        ratios = [run["prefill_s"] / max(run["sweep_s"], run["torch_s"]) for run in runs]
        record = {
            **machine.provenance(" ".join(["python", *sys.argv])),
            "model": llm.describe(),
            "budget_bytes": llm.plan.budget_bytes,
            "peak_bytes": peak_memory_bytes(),
            "tokens": options.tokens,
            "runs": runs,
            "summary": {"prefill_over_larger": statistics.median(ratios)},
        }
    text = json.dumps(record, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
