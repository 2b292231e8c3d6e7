"""Prompts from a file of JSON lines."""

import json
from dataclasses import dataclass
from pathlib import Path

from subspec.errors import OptionError


@dataclass(frozen=True)
class Prompt:
    """One question: its id in the file (or its line number) and the user's first message."""

    prompt_id: str | int
    text: str


def load_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Read the prompts, ``limit`` evenly spaced ones if given, the first line always among them.

    Raises:
        OptionError: the file cannot be read, a line is not a prompt, or nothing is left.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"--limit {limit}: at least 1")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read the prompts: {error}") from error
    prompts = [
        _parse(line, f"{path}:{number}", number) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not prompts:
        raise OptionError(f"{path} holds no prompts")
    count = min(limit or len(prompts), len(prompts))
    return [prompts[index * len(prompts) // count] for index in range(count)]


def _parse(line: str, where: str, number: int) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise OptionError(f"{where}: not JSON: {error}") from error
    turns = record.get("turns") if isinstance(record, dict) else None
    if not (isinstance(turns, list) and turns and isinstance(turns[0], str)):
        raise OptionError(f'{where}: expected {{"turns": ["user message", …]}}')
    prompt_id = record.get("id", number)
    return Prompt(prompt_id if isinstance(prompt_id, str | int) else number, turns[0])
