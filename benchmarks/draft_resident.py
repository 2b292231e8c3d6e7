"""Whether the draft should use the exact weights of resident layers, or their substitutes.

    python benchmarks/draft_resident.py MODEL --memory SIZE --prompts FILE.jsonl [--limit K] [--out FILE]

Gives the draft the exact products of the resident layers on every other run, and records acceptance
length and seconds a draft level for both.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from subspec import LLM, SamplingParams
from subspec.bench import machine
from subspec.bench.prompts import load_prompts
from subspec.models.decoder import LayerProducts, WholeLayer

VARIANTS = ("substitutes", "exact")


def exact_where_resident(llm: LLM) -> list[LayerProducts | WholeLayer]:
    """The draft's layers with exact products wherever the weights are resident."""
    engine = llm.engine
    mixed = list(engine.drafter.layers)
    for index, unit in enumerate(engine.weights.layers):
        if unit.memory is not None:
            mixed[index] = LayerProducts(*engine.weights.products(unit, None))
    return mixed


def main() -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--memory", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with LLM(options.model, options.memory) as llm:
        layers = {"substitutes": llm.engine.drafter.layers, "exact": exact_where_resident(llm)}
        runs: list[dict[str, Any]] = []
        for prompt in load_prompts(options.prompts, options.limit):
            for variant in VARIANTS:
                llm.engine.drafter.layers = layers[variant]
                llm.reset()
                params = SamplingParams(max_new_tokens=options.max_new_tokens)
                figures = llm.generate([{"role": "user", "content": prompt.text}], params).statistics
                levels = sum(-(-(nodes - 1) // llm.plan.width) for nodes in figures.drafted)
                runs.append(
                    {"variant": variant, "prompt_id": prompt.prompt_id, "levels": levels, **figures.as_dict()}
                )
        summary = {}
        for variant in VARIANTS:
            mine = [run for run in runs if run["variant"] == variant]
            summary[variant] = {
                "acceptance_length": sum(run["new_tokens"] - 1 for run in mine)
                / sum(run["steps"] for run in mine),
                "level_s": sum(run["draft_s"] for run in mine) / sum(run["levels"] for run in mine),
                "tok_s": sum(run["new_tokens"] - 1 for run in mine) / sum(run["decode_s"] for run in mine),
            }
        record = {
            **machine.provenance(" ".join(["python", *sys.argv])),
            "model": llm.describe(),
            "plan": llm.plan.as_dict(),
            "runs": runs,
            "summary": summary,
        }
    text = json.dumps(record, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    sys.stdout.write(json.dumps(summary, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
