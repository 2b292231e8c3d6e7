"""``subspec verify``: prove a store against the checkpoint it was made from, bit for bit."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from subspec.cli.progress import TerminalProgress

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="A prepared model's directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def verify(store: StorePath, as_json: Json = False) -> None:
    """Rebuild every tensor of a store and compare its SHA-256 with the checkpoint's.

    Prints a line a tensor.  Where the checkpoint is gone or has changed, compares with the sums taken when
    the store was prepared.  Exits with 1 if anything differs or is damaged.
    """
    from subspec.store.verify import verify as findings_of

    with TerminalProgress() as progress:
        findings = list(findings_of(store, progress))
    bad = [finding for finding in findings if not finding.good]
    if as_json:
        print(json.dumps([{**asdict(finding), "good": finding.good} for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{'ok ' if finding.good else 'BAD'} {finding.rebuilt or '-' * 64}  {finding.tensor}")
    for problem in dict.fromkeys(finding.problem for finding in bad if finding.problem):
        print(f"error: {problem}", file=sys.stderr)
    for finding in bad:
        if not finding.problem:
            print(f"error: {finding.tensor}: the {finding.source} has {finding.expected}", file=sys.stderr)
    sources = {finding.source for finding in findings}
    against = "the checkpoint" if sources == {"checkpoint"} else "the sums taken when it was prepared"
    print(
        f"{len(findings) - len(bad)} of {len(findings)} tensors are bit for bit those of {against}",
        file=sys.stderr,
    )
    if bad:
        raise typer.Exit(1)
