"""``subspec demo``: the whole thing on a small model, from fetching it to identical tokens."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subspec.cli import options
from subspec.cli.answer import print_answer
from subspec.cli.progress import TerminalProgress

if TYPE_CHECKING:
    from subspec.generation import Result

MEMORY = "200MiB"
CONTEXT = 1024
QUESTION = "Write a short story about a lighthouse keeper who finds a message in a bottle."

Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help=f"All the memory the engine may hold; with a GPU: --vram.  [default: {MEMORY}]",
    ),
]
Question = Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.")]


def demo(
    prompt: Question = QUESTION,
    memory: Memory = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
    device: options.DeviceChoice = options.Device.AUTO,
    max_new_tokens: options.MaxNewTokens = 128,
    store: options.Store = None,
) -> None:
    """Fetch and prepare a small model, then answer in less memory than it needs, plain and speculative."""
    from subspec.checkpoint.embedded import fetch_demo
    from subspec.planning.device import budgets_here

    params = options.sampling(max_new_tokens=max_new_tokens)
    budgets: dict[str, Any] = {"vram": vram, "ram": ram, "device": device.value}
    budgets["memory"] = MEMORY if memory is None and vram is None else memory
    budgets_here(**budgets)  # before anything is fetched
    with TerminalProgress() as progress:
        print("Fetching the model …", flush=True)
        fetch_demo(lambda step: print(f"  {step}", flush=True))
        print("Preparing it (once) …", flush=True)
        with options.open_llm("demo", progress, **budgets, context=CONTEXT, store=store) as llm:
            print(f"\n{llm.plan.explain()}\n\n> {prompt}\n", flush=True)
            results = {}
            for mode in ("plain", "speculative"):
                llm.reset()
                print(f"── {mode} ──", flush=True)
                results[mode] = print_answer(llm, prompt, params, mode=mode)
            held = llm.plan.budgets
    _compare(results["plain"], results["speculative"], held)


def _compare(plain: "Result", speculative: "Result", budgets: str) -> None:
    """Print both runs' figures; exit with 1 if the tokens differ."""
    from subspec.memory.tiers import format_size, peak_memory_bytes

    for result in (plain, speculative):
        one = result.statistics
        print(
            f"{one.mode:<12} {one.new_tokens} tokens · {one.tok_s:.2f} tok/s · "
            f"acceptance length {one.acceptance_length:.2f} · streamed {format_size(one.streamed_bytes)}"
        )
    if plain.statistics.tok_s:
        print(f"speed-up     {speculative.statistics.tok_s / plain.statistics.tok_s:.2f} ×")
    peak = format_size(peak_memory_bytes())
    print(f"memory       peak of the process {peak}, budget of the engine {budgets}")
    if plain.token_ids != speculative.token_ids:
        print("error: the two modes gave different tokens", file=sys.stderr)
        raise typer.Exit(1)
    print(f"identical    yes, all {len(plain.token_ids)} tokens")
