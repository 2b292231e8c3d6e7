"""The options that several commands share: their names, help texts, and what becomes of them.

Says nothing about what an option does to a run; that is decided by ``LLM`` and ``SamplingParams``.
"""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from subspec.cli.progress import TerminalProgress
    from subspec.generation import LLM
    from subspec.speculation.sampling import SamplingParams


class Mode(StrEnum):
    """How tokens are decoded; both modes give the same tokens."""

    PLAIN = "plain"
    SPECULATIVE = "speculative"


class Device(StrEnum):
    """What computes; the tokens of two devices may differ, those of one device never do."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    EMULATED = "emulated"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face directory, a GGUF file, a hub id, a prepared store, or 'demo'.",
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="All the memory the engine may hold, such as 1.5GiB; with a GPU: --vram.",
    ),
]
Vram = Annotated[
    str | None,
    typer.Option(
        "--vram",
        metavar="SIZE",
        help="All that the engine may hold in the GPU's memory.  [default: what is free]",
    ),
]
Ram = Annotated[
    str | None,
    typer.Option(
        "--ram",
        metavar="SIZE",
        help="All that it may pin in RAM behind the GPU; the rest stays on disk.  [default: up to 60 %]",
    ),
]
DeviceChoice = Annotated[
    Device,
    typer.Option("--device", help="What computes; 'emulated' takes RAM for VRAM, to try plans."),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        metavar="N",
        help="Longest text, prompt and answer, in tokens.  [default: 4096]",
    ),
]
Store = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="The prepared model's directory.  [default: one in the user's cache]",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="bfloat16, float16 or float32 instead of the model's own.",
    ),
]
Stream = Annotated[
    str | None,
    typer.Option(
        "--stream",
        metavar="FORM",
        help="Stream 'residual' or 'raw' weights; the tokens are the same.  "
        "[default: the store's own form, else residual; fp32: raw]",
    ),
]
Paranoid = Annotated[
    bool,
    typer.Option("--paranoid", help="Verify every checksum on every read, not only the first."),
]
DecodeMode = Annotated[
    Mode,
    typer.Option("--mode", help="Decode with or without speculation; the tokens are the same."),
]
Depth = Annotated[
    int | None,
    typer.Option(
        "--depth",
        metavar="N",
        help="Levels of the draft tree.  Any one of this and the next four options pins a fixed tree.  "
        "[default: measured]",
    ),
]
Width = Annotated[
    int | None,
    typer.Option("--width", metavar="N", help="Nodes kept on a level.  [default: measured]"),
]
Nodes = Annotated[
    int | None,
    typer.Option(
        "--nodes",
        metavar="N",
        help="Nodes verified in a sweep, the text's last token among them.  [default: measured]",
    ),
]
MinReach = Annotated[
    float | None,
    typer.Option(
        "--min-reach",
        metavar="P",
        help="Draft on while the last level is reached at least this likely.  [default: measured]",
    ),
]
DraftTemperature = Annotated[
    float | None,
    typer.Option(
        "--draft-temperature",
        metavar="T",
        help="Divides the draft's logits.  [default: measured]",
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option("--max-new-tokens", metavar="N", help="Stop after so many tokens."),
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", metavar="T", help="Sample at T.  [default: greedy]"),
]
TopK = Annotated[
    int,
    typer.Option("--top-k", metavar="K", help="Sample among the K likeliest; 0: all."),
]
TopP = Annotated[
    float,
    typer.Option("--top-p", metavar="P", help="Sample among the likeliest that hold P."),
]
MinP = Annotated[
    float,
    typer.Option("--min-p", metavar="P", help="Drop tokens below P times the likeliest."),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        "--repetition-penalty",
        metavar="X",
        help="Divide the logits of tokens seen by X.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="S", help="The same seed gives the same text.")]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="Stop before TEXT; may be repeated."),
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")]


def open_llm(model: str, progress: "TerminalProgress", **choices: Any) -> "LLM":
    """Load a model with the options that were given; one left at ``None`` keeps the engine's default."""
    from subspec.generation import LLM

    given = {name: value for name, value in choices.items() if value is not None}
    return LLM(model, progress=progress, **given)


def sampling(stop: list[str] | None = None, **choices: Any) -> "SamplingParams":
    """The sampling parameters for the given options."""
    from subspec.speculation.sampling import SamplingParams

    return SamplingParams(stop=tuple(stop or ()), **choices)
