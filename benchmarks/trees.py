"""Adaptive trees against the best fixed one that hindsight finds for a budget, and against plain decoding.

    python benchmarks/trees.py MODEL --memory 1.5GiB --prompts FILE --out FILE

Twelve fixed trees run on a few prompts; the one with the best median of tokens/s then runs, interleaved with
the adaptive one and several times, on more of them.  All share one engine, its kernels and its plan.  A
prompt's keys and values are kept between its runs, so that only decoding is repeated.  Greedy unless
``--temperature`` is given; ``--best-of FILE`` takes the fixed tree that an earlier result found.  With
``--ignore-eos`` texts go on after their end, so that all have ``--max-new-tokens`` tokens; without it a short
text weighs a tree by whether its depth happens to be the text's length.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from subspec import LLM, SamplingParams
from subspec.bench.link import LinkMeter
from subspec.bench.machine import provenance
from subspec.bench.prompts import Prompt, load_prompts
from subspec.bench.report import write_json
from subspec.bench.runs import run_record
from subspec.memory.tiers import peak_memory_bytes
from subspec.speculation.adaptive import Speculator
from subspec.speculation.draft import TreeShape

DEPTHS = {"streaming": (6, 12, 20, 32), "resident": (2, 4, 6, 10)}
WIDTHS = (1, 2, 4)
MOST_NODES = 64
WARM_UP_TOKENS = 24

Run = dict[str, Any]


def grid(llm: LLM) -> list[TreeShape]:
    """The fixed trees to choose from: deeper ones where sweeps stream."""
    depths = DEPTHS["streaming" if llm.plan.streamed_bytes else "resident"]
    shapes = [
        TreeShape(depth, width, min(1 + depth * width, MOST_NODES)) for depth in depths for width in WIDTHS
    ]
    assert all(shape.drafted <= llm.plan.tree_slots for shape in shapes)
    return shapes


class Bench:
    """Runs prompts on one model with one tree or another.

    Args:
        llm: opened without pinning a tree.
        adaptive: its own tree.
        params: for all but plain runs.
        plain_tokens: of a plain run.
    """

    def __init__(self, llm: LLM, params: SamplingParams, plain_tokens: int) -> None:
        assert isinstance(llm.tree, Speculator), "pin no tree"
        self._llm, self._adaptive, self._params = llm, llm.tree, params
        self._plain_tokens = plain_tokens
        self.tokens: dict[Any, list[int]] = {}

    def run(self, prompt: Prompt, tree: TreeShape | str, max_new_tokens: int | None = None) -> Run:
        """One run: a fixed tree, ``adaptive`` or ``plain``; its tokens must be those of the runs before."""
        limit = max_new_tokens or (self._plain_tokens if tree == "plain" else self._params.max_new_tokens)
        params = replace(self._params, max_new_tokens=limit)
        self._llm.tree = tree if isinstance(tree, TreeShape) else self._adaptive
        mode = "plain" if tree == "plain" else "speculative"
        result = self._llm.generate([{"role": "user", "content": prompt.text}], params, mode=mode)
        self._llm.tree = self._adaptive
        known = self.tokens.setdefault(prompt.prompt_id, result.token_ids)
        common = min(len(known), len(result.token_ids))
        if known[:common] != result.token_ids[:common]:
            raise SystemExit(f"{prompt.prompt_id}: {tree} gave other tokens")
        if len(result.token_ids) > len(known):
            self.tokens[prompt.prompt_id] = result.token_ids
        name = "fixed" if isinstance(tree, TreeShape) else tree
        record = run_record(result, prompt_id=prompt.prompt_id, link_bytes_per_s=None)
        del record["token_ids"], record["link_utilization"]
        return {**record, "tree": name}


def median_of(runs: Iterable[Run], tree: str, prompt_id: Any) -> float:
    """Median tokens/s of a tree's runs on one prompt."""
    return statistics.median(
        run["tok_s"] for run in runs if run["tree"] == tree and run["prompt_id"] == prompt_id
    )


def per_step(runs: list[Run], link_bytes_per_s: float | None) -> dict[str, float]:
    """Where the adaptive steps' seconds went, and what link and processor alone would have needed."""
    own = [run for run in runs if run["tree"] == "adaptive"]
    steps = sum(run["steps"] for run in own)
    total = {
        name: sum(run[name] for run in own) / steps
        for name in ("decode_s", "draft_s", "gap_s", "verify_s", "wait_s", "wasted_s", "streamed_bytes")
    }
    computing_s = total["decode_s"] - total["wait_s"]
    link_s = total["streamed_bytes"] / link_bytes_per_s if link_bytes_per_s else 0.0
    return {
        **total,
        "tokens": sum(run["acceptance_length"] * run["steps"] for run in own) / steps,
        "verified": statistics.fmean(nodes for run in own for nodes in run["verified"]),
        "drafted": statistics.fmean(nodes for run in own for nodes in run["drafted"]),
        "sweep_computing_s": total["verify_s"] - total["gap_s"] - total["wait_s"],
        "link_s": link_s,
        "link_utilization": link_s / total["decode_s"],
        "of_the_larger": total["decode_s"] / max(link_s, computing_s),
    }


def summarize(runs: list[Run], link_bytes_per_s: float | None) -> dict[str, Any]:
    """Ratios of medians by prompt, and the adaptive step in parts."""
    prompts = list(dict.fromkeys(run["prompt_id"] for run in runs))
    rates = {
        tree: [median_of(runs, tree, prompt) for prompt in prompts] for tree in ("plain", "fixed", "adaptive")
    }
    over_fixed = [a / f for a, f in zip(rates["adaptive"], rates["fixed"], strict=True) if f]
    over_plain = [a / p for a, p in zip(rates["adaptive"], rates["plain"], strict=True) if p]
    return {
        "tok_s": {tree: statistics.median(found) for tree, found in rates.items()},
        "over_fixed": {"median": statistics.median(over_fixed), "least": min(over_fixed), "all": over_fixed},
        "ratio_of_medians": statistics.median(rates["adaptive"]) / statistics.median(rates["fixed"]),
        "over_plain": {"median": statistics.median(over_plain), "least": min(over_plain), "all": over_plain},
        "adaptive_step": per_step(runs, link_bytes_per_s),
    }


def best_fixed(bench: Bench, llm: LLM, prompts: list[Prompt]) -> tuple[TreeShape, list[dict[str, Any]]]:
    """The tree of the grid with the best median tokens/s, and all of them."""
    found: dict[TreeShape, list[float]] = {shape: [] for shape in grid(llm)}
    for prompt in prompts:
        for shape, rates in found.items():
            rates.append(bench.run(prompt, shape)["tok_s"])
    rows = [
        {"depth": s.depth, "width": s.width, "nodes": s.nodes, "tok_s": rates} for s, rates in found.items()
    ]
    return max(found, key=lambda shape: statistics.median(found[shape])), rows


def main() -> None:
    """Run the grid, then the comparison, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--memory", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--grid-limit", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--plain-max-new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--stream")
    parser.add_argument("--best-of", type=Path)
    options = parser.parse_args()
    params = SamplingParams(
        options.max_new_tokens, temperature=options.temperature, seed=0, ignore_eos=options.ignore_eos
    )
    prompts = load_prompts(options.prompts, options.limit)
    with LLM(options.model, options.memory, stream=options.stream) as llm:
        bench, meter = Bench(llm, params, options.plain_max_new_tokens), LinkMeter(llm.store_path)
        for tree in ("adaptive", grid(llm)[0]):
            bench.run(prompts[0], tree, WARM_UP_TOKENS)
        if options.best_of:
            shape, rows = TreeShape(**json.loads(options.best_of.read_text())["best_fixed"]), []
        else:
            shape, rows = best_fixed(bench, llm, load_prompts(options.prompts, options.grid_limit))
        if llm.plan.streamed_bytes:
            meter.measure_all()
        runs: list[Run] = []
        for prompt in prompts:
            runs.append(bench.run(prompt, "plain"))
            for repeat in range(options.repeats):
                pair: list[TreeShape | str] = [shape, "adaptive"]
                runs += [bench.run(prompt, tree) for tree in (pair if repeat % 2 else pair[::-1])]
            sys.stderr.write(f"{prompt.prompt_id}: {[round(run['tok_s'], 2) for run in runs[-7:]]}\n")
        if llm.plan.streamed_bytes:
            meter.measure_all()
        record = {
            **provenance(" ".join(["python", "benchmarks/trees.py", *sys.argv[1:]])),
            "model": llm.describe(),
            "settings": {name: value for name, value in vars(options).items() if not isinstance(value, Path)},
            "plan": llm.plan.as_dict(),
            "budget_bytes": llm.plan.budget_bytes,
            "peak_bytes": peak_memory_bytes(),
            "link_bytes_per_s": meter.lasting_bytes_per_s,
            "link_measurements": meter.measurements,
            "best_fixed": {"depth": shape.depth, "width": shape.width, "nodes": shape.nodes},
            "grid": rows,
            "runs": runs,
            "speculation": llm.speculation(),
            "summary": summarize(runs, meter.lasting_bytes_per_s),
        }
    write_json(record, options.out)
    sys.stdout.write(json.dumps(record["summary"], indent=1) + "\n")


if __name__ == "__main__":
    main()
