"""``subspec prepare``: turn a checkpoint into a store, ahead of its first use."""

import sys
import time
from typing import Annotated

import typer

from subspec.cli import options
from subspec.cli.progress import TerminalProgress

Rebuild = Annotated[bool, typer.Option("--rebuild", help="Prepare again even if the store is good.")]


def prepare(
    model: options.Model,
    store: options.Store = None,
    dtype: options.Dtype = None,
    stream: options.Stream = None,
    rebuild: Rebuild = False,
) -> None:
    """Prepare a model for streaming, once.  Prints the store's place; goes on where a killed run stopped."""
    from subspec.memory.tiers import format_size, peak_memory_bytes
    from subspec.store.manifest import Manifest
    from subspec.store.prepare import prepare as prepare_store

    start = time.monotonic()
    with TerminalProgress() as progress:
        path = prepare_store(
            model, store=store, dtype=dtype, stream=stream, progress=progress, rebuild=rebuild
        )
    elapsed_s = time.monotonic() - start
    size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(path)
    facts = [
        f"{format_size(size_bytes)} on disk",
        f"streams {Manifest.read(path).codec}",
        f"{elapsed_s:.1f} s",
        f"peak {format_size(peak_memory_bytes())}",
    ]
    print(" · ".join(facts), file=sys.stderr)
