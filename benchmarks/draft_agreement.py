"""How often a store's substitutes alone choose the exact model's token.

    python benchmarks/draft_agreement.py STORE [STORE ...] --memory 3GiB --prompts FILE --out FILE

The first store's tokenizer reads the prompts, and its exact model continues them greedily; all stores must be
of one checkpoint.  Each store's draft then sees the exact prompt's keys and values and its own of the
continuation, as on a draft's chain, and is asked for every token of it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from subspec import LLM, SamplingParams
from subspec.bench.machine import provenance
from subspec.bench.prompts import load_prompts
from subspec.bench.report import write_json
from subspec.generation.prompt import encode, load_tokenizer
from subspec.models.decoder import prefix_rows

TEMPERATURES = [0.2 * 1.1**step for step in range(20)]
Text = tuple[list[int], list[int]]


def continued(store: Path, memory: str, prompts: Path, limit: int, tokens: int) -> list[Text]:
    """Prompts and their greedy continuations, in tokens."""
    texts, tokenizer = [], load_tokenizer(store / "tokenizer")
    with LLM(store, memory) as llm:
        for prompt in load_prompts(prompts, limit):
            messages = [{"role": "user", "content": prompt.text}]
            ids = encode(tokenizer, messages, llm.engine.config.vocab_size, raw=False)
            texts.append((ids, llm.generate(ids, SamplingParams(tokens)).token_ids))
    return texts


def agreement(store: Path, memory: str, texts: list[Text]) -> dict[str, Any]:
    """The share of tokens that the draft puts first; their negative log likelihood, temperature fitted."""
    logits, taken = [], []
    with LLM(store, memory) as llm:
        for prompt, answer in texts:
            llm.engine.target(prefix_rows(prompt, 0), last_only=True)
            rows = prefix_rows([prompt[-1], *answer[:-1]], len(prompt) - 1)
            logits.append(llm.engine.draft(rows).float())
            taken.append(torch.tensor(answer))
    scores, tokens = torch.cat(logits), torch.cat(taken)
    loss, temperature = min(
        (float(torch.nn.functional.cross_entropy(scores / one, tokens)), one) for one in TEMPERATURES
    )
    return {
        "store": store.name,
        "tokens": len(tokens),
        "agreement": float((scores.argmax(-1) == tokens).float().mean()),
        "negative_log_likelihood": loss,
        "temperature": temperature,
    }


def main() -> None:
    """Compare the stores and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--memory", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    texts = continued(options.stores[0], options.memory, options.prompts, options.limit, options.tokens)
    found = [agreement(store, options.memory, texts) for store in options.stores]
    record = {
        **provenance(" ".join(["python", "benchmarks/draft_agreement.py", *sys.argv[1:]])),
        "prompts": len(texts),
        "stores": found,
    }
    write_json(record, options.out)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
