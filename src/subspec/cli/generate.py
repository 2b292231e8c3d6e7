"""``subspec generate``: one prompt, one answer, streamed to standard output."""

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subspec.cli import options
from subspec.cli.answer import print_answer, summary_line
from subspec.cli.progress import TerminalProgress
from subspec.errors import OptionError

if TYPE_CHECKING:
    from subspec.generation import LLM, Result

Prompt = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT|-",
        help="The user's message; '-' or nothing reads standard input.",
    ),
]
Raw = Annotated[
    bool,
    typer.Option("--raw", help="Continue the prompt as it is, without the chat template."),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object: text, tokens and measurements."),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Write when reads, layers, drafts and steps happened, for https://ui.perfetto.dev.",
    ),
]


def generate(
    model: options.Model,
    prompt: Prompt = None,
    memory: options.Memory = "auto",
    vram: options.Vram = None,
    ram: options.Ram = None,
    device: options.DeviceChoice = options.Device.AUTO,
    context: options.Context = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = None,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    system: options.System = None,
    raw: Raw = False,
    as_json: Json = False,
    mode: options.DecodeMode = options.Mode.SPECULATIVE,
    depth: options.Depth = None,
    width: options.Width = None,
    nodes: options.Nodes = None,
    min_reach: options.MinReach = None,
    draft_temperature: options.DraftTemperature = None,
    dtype: options.Dtype = None,
    stream: options.Stream = None,
    paranoid: options.Paranoid = False,
    store: options.Store = None,
    trace: Trace = None,
) -> None:
    """Answer one prompt.  The text goes to standard output, a line of statistics to standard error."""
    from subspec.memory.timeline import require_writable

    question = _question(prompt, system, raw)
    if trace is not None:
        require_writable(trace)
    engine = {
        "memory": memory,
        "vram": vram,
        "ram": ram,
        "device": device.value,
        "context": context,
        "mode": mode.value,
        "dtype": dtype,
        "stream": stream,
        "paranoid": paranoid,
        "store": store,
    }
    tree = {
        "depth": depth,
        "width": width,
        "nodes": nodes,
        "min_reach": min_reach,
        "draft_temperature": draft_temperature,
    }
    params = options.sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, stop=stop,
    )  # fmt: skip
    with (
        TerminalProgress() as progress,
        options.open_llm(model, progress, **engine, **tree) as llm,
        contextlib.nullcontext() if trace is None else llm.traced(trace),
    ):
        if as_json:
            print(json.dumps(_record(llm, llm.generate(question, params, raw=raw)), indent=2))
            return
        result = print_answer(llm, question, params, raw=raw)
        print(summary_line(result, llm.plan.budgets), file=sys.stderr)


def _question(prompt: str | None, system: str | None, raw: bool) -> str | list[dict[str, str]]:
    """The prompt as ``LLM.generate`` takes it.

    Raises:
        OptionError: there is no prompt, or a system message where no template would carry it.
    """
    if raw and system is not None:
        raise OptionError("--raw sends no chat template, so there is no place for --system: drop one of them")
    if prompt is None and sys.stdin.isatty():
        raise OptionError("no prompt: give one after MODEL, or pipe it in")
    text = sys.stdin.read() if prompt in (None, "-") else str(prompt)
    if raw:
        return text
    if not text.strip():
        raise OptionError("the prompt is empty: give some text, or use --raw to start from nothing")
    user = {"role": "user", "content": text.strip("\n")}
    return [user] if system is None else [{"role": "system", "content": system}, user]


def _record(llm: "LLM", result: "Result") -> dict[str, Any]:
    """The run as a bench records it, with its text.

    The link is measured after the answer, and only when something was streamed.
    """
    from subspec.bench.link import LinkMeter
    from subspec.bench.runs import run_record
    from subspec.memory.tiers import peak_memory_bytes

    peak_bytes = peak_memory_bytes()
    meter = LinkMeter(llm.store_path)
    if result.statistics.streamed_bytes:
        meter.measure_all()
    record = run_record(result, prompt_id=None, link_bytes_per_s=meter.lasting_bytes_per_s)
    return {
        **record,
        "text": result.text,
        "peak_bytes": peak_bytes,
        "budget_bytes": llm.plan.budget_bytes,
        "host_budget_bytes": llm.plan.host_budget_bytes,
    }
