"""``subspec bench``: the modes against one another on a file of prompts, with all that was measured."""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subspec.cli import options
from subspec.cli.progress import TerminalProgress
from subspec.errors import OptionError

if TYPE_CHECKING:
    from subspec.bench.link import LinkMeter
    from subspec.bench.runs import Settings
    from subspec.generation import LLM

Prompts = Annotated[
    Path,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help='JSON lines {"turns": ["user message", …]}; each line\'s first message is used.',
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="All the memory the engine may hold, such as 1.5GiB.  [required, or --vram]",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="K", help="Use K evenly spaced lines.  [default: all]"),
]
PlainMaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--plain-max-new-tokens",
        metavar="N",
        help="The limit of the modes raw and plain.  [default: the same]",
    ),
]
Modes = Annotated[
    str,
    typer.Option("--modes", metavar="LIST", help="Which modes to run, in this order."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="The JSON's file.  [default: standard output]"),
]


def bench(
    model: options.Model,
    prompts: Prompts,
    memory: Memory = None,
    vram: options.Vram = None,
    ram: options.Ram = None,
    device: options.DeviceChoice = options.Device.AUTO,
    limit: Limit = None,
    max_new_tokens: options.MaxNewTokens = 128,
    plain_max_new_tokens: PlainMaxNewTokens = None,
    modes: Modes = "plain,speculative",
    temperature: options.Temperature = None,
    seed: options.Seed = 0,
    context: options.Context = None,
    depth: options.Depth = None,
    width: options.Width = None,
    nodes: options.Nodes = None,
    min_reach: options.MinReach = None,
    draft_temperature: options.DraftTemperature = None,
    dtype: options.Dtype = None,
    stream: options.Stream = None,
    paranoid: options.Paranoid = False,
    store: options.Store = None,
    out: Out = None,
) -> None:
    """Time the modes in turn on every prompt.  Exits with 1 if their tokens differ."""
    from subspec.bench.link import LinkMeter
    from subspec.bench.prompts import load_prompts
    from subspec.bench.runs import Models, Settings, parse_modes, run_prompts

    settings = Settings(parse_modes(modes), max_new_tokens, plain_max_new_tokens, temperature, seed)
    if memory is None and vram is None:
        raise OptionError("a bench needs a budget to be about: give --memory, or with a GPU --vram")
    chosen = load_prompts(prompts, limit)
    if out is not None and not out.parent.is_dir():
        raise OptionError(f"--out {out}: there is no directory {out.parent}")
    if "raw" in settings.modes and (store is not None or stream is not None):
        raise OptionError("the mode raw has a store of its own: leave out --store and --stream, or raw")
    budgets = {"memory": memory, "vram": vram, "ram": ram, "device": device.value}
    engine = {**budgets, "context": context, "dtype": dtype, "store": store, "paranoid": paranoid}
    tree = {
        "depth": depth,
        "width": width,
        "nodes": nodes,
        "min_reach": min_reach,
        "draft_temperature": draft_temperature,
    }
    with TerminalProgress() as progress:
        models = Models(
            lambda form: options.open_llm(model, progress, **engine, **tree, stream=form or stream)
        )
        try:
            meter = LinkMeter(models(settings.modes[-1]).store_path)
            runs = run_prompts(models, chosen, settings, meter, progress)
            record = {**_record(models(settings.modes[-1]), settings, meter, runs), "plans": models.plans}
        finally:
            models.close()
    _publish(record, out)


def _record(
    llm: "LLM", settings: "Settings", meter: "LinkMeter", runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Everything a reader needs to repeat the bench and to judge it."""
    from subspec.bench import machine
    from subspec.bench.report import summarize
    from subspec.memory.tiers import peak_memory_bytes

    return {
        **machine.provenance(shlex.join(["subspec", *sys.argv[1:]])),
        "model": llm.describe(),
        "settings": asdict(settings),
        "seed": settings.seed,
        "plan": llm.plan.as_dict(),
        "speculation": llm.speculation(),
        "budget_bytes": llm.plan.budget_bytes,
        "host_budget_bytes": llm.plan.host_budget_bytes,
        "peak_bytes": peak_memory_bytes(),
        "link_bytes_per_s": meter.lasting_bytes_per_s,
        "link_measurements": meter.measurements,
        "runs": runs,
        "summary": summarize(runs),
    }


def _publish(record: dict[str, Any], out: Path | None) -> None:
    """Write the JSON and print the table; with no file, the JSON has standard output for itself."""
    from rich.console import Console

    from subspec.bench.report import table, to_json, write_json
    from subspec.memory.tiers import format_size

    if out is None:
        print(to_json(record))
    else:
        write_json(record, out)
    console = Console(stderr=out is None)
    console.print(table(record["runs"], record["summary"]))
    peak, budget = format_size(record["peak_bytes"]), format_size(record["budget_bytes"])
    if record["host_budget_bytes"] is not None:
        budget += f" VRAM, {format_size(record['host_budget_bytes'])} RAM"
    speed = record["link_bytes_per_s"]
    link = f"link {speed / 1e9:.2f} GB/s" if speed else "nothing streamed"
    console.print(f"peak of the process {peak} · budget of the engine {budget} · {link}", highlight=False)
    if record["summary"]["identical"] is False:
        print("error: the modes gave different tokens", file=sys.stderr)
        raise typer.Exit(1)
