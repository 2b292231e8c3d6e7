"""What runs show together: the summary, the whole result record, and the table for people."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Run = dict[str, Any]


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of a bench.

    Returns:
        ``tok_s``: the median per mode; ``speedup``: the median of the per-prompt ratios speculative ÷ plain;
        ``speedup_over_raw``: of speculative ÷ raw; ``sweep_ratio``: of the seconds of a sweep, raw ÷ plain;
        ``acceptance_length``: tokens committed per step over all speculative steps; ``link_utilization``:
        the median per mode; ``wasted_draft_share``: of the seconds spent drafting, those whose guesses came
        to nothing; ``tree_nodes`` and ``verified_nodes``: the mean of a step; ``identical``: whether all
        modes gave the same tokens (see ``same_tokens``),
        ``None`` if there was nothing to compare.  A figure that the runs do not give is ``None``.
    """
    modes = list(dict.fromkeys(run["mode"] for run in runs))
    pairs, raw_pairs, plain_pairs = paired(runs), paired(runs, "raw"), paired(runs, "raw", "plain")
    compared = [*pairs, *raw_pairs, *plain_pairs]
    speculative = [run for run in runs if run["mode"] == "speculative"]
    return {
        "tok_s": {mode: _median([run["tok_s"] for run in runs if run["mode"] == mode]) for mode in modes},
        "speedup": _median([speedup(*pair) for pair in pairs]),
        "speedup_over_raw": _median([speedup(*pair) for pair in raw_pairs]),
        "sweep_ratio": _median(
            [sweep_s(raw) / sweep_s(plain) for raw, plain in plain_pairs if plain["steps"]]
        ),
        "acceptance_length": _acceptance_length(speculative),
        "link_utilization": {
            mode: _median([run["link_utilization"] for run in runs if run["mode"] == mode]) for mode in modes
        },
        "wasted_draft_share": _wasted_share(speculative),
        "tree_nodes": _mean([nodes for run in speculative for nodes in run["drafted"]]),
        "verified_nodes": _mean([nodes for run in speculative for nodes in run["verified"]]),
        "identical": all(same_tokens(*pair) for pair in compared) if compared else None,
    }


def paired(runs: Sequence[Run], one: str = "plain", other: str = "speculative") -> list[tuple[Run, Run]]:
    """The runs of two modes on every prompt that has both."""
    prompts = list(dict.fromkeys(run["prompt_id"] for run in runs))
    found = {(run["prompt_id"], run["mode"]): run for run in runs}
    pairs = ((found.get((prompt, one)), found.get((prompt, other))) for prompt in prompts)
    return [(first, second) for first, second in pairs if first and second]


def sweep_s(run: Run) -> float:
    """Seconds of a sweep: of a step, in a plain mode."""
    return float(run["decode_s"] / run["steps"]) if run["steps"] else 0.0


def same_tokens(one: Run, other: Run) -> bool:
    """Whether two runs agree on the length they have in common, which must not be empty.

    A run may be the shorter one only because its limit on new tokens cut it off; one that ended by itself
    where the other went on has given another text.
    """
    first, second = one["token_ids"], other["token_ids"]
    common = min(len(first), len(second))
    shorter = one if len(first) < len(second) else other
    if len(first) != len(second) and shorter["finish_reason"] != "length":
        return False
    return common > 0 and bool(first[:common] == second[:common])


def speedup(plain: Run, speculative: Run) -> float | None:
    """Ratio of the two runs' tokens/s, if both decoded long enough to have one."""
    if not (_is_positive(plain["tok_s"]) and _is_positive(speculative["tok_s"])):
        return None
    return float(speculative["tok_s"] / plain["tok_s"])


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a record so that the file is either whole or not there."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(to_json(record) + "\n", encoding="utf-8")
    unfinished.replace(path)


def to_json(record: dict[str, Any]) -> str:
    """A record as strict JSON, with lists of numbers on one line each."""
    return (
        "{\n" + ",\n".join(f"{json.dumps(name)}: {_value(value)}" for name, value in record.items()) + "\n}"
    )


def table(runs: Sequence[Run], summary: dict[str, Any]) -> "Table":
    """A line per prompt and one for all, within 80 columns; the link's is the plain mode's if it ran."""
    from rich import box
    from rich.table import Table

    modes = list(summary["tok_s"])
    linked = "plain" if "plain" in modes else modes[0]
    names = ["prompt", *(f"{mode}\ntok/s" for mode in modes)]
    names += ["speed-up", *(["over\nraw"] if "raw" in modes else [])]
    names += ["acceptance\nlength", f"{linked}\nlink", "same\ntokens"]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in names:
        grid.add_column(name, justify="right")
    for prompt in dict.fromkeys(run["prompt_id"] for run in runs):
        own = [run for run in runs if run["prompt_id"] == prompt]
        grid.add_row(str(prompt), *map(_cell, _cells(summarize(own), modes, linked)))
    grid.add_section()
    grid.add_row("all", *map(_cell, _cells(summary, modes, linked)))
    return grid


def _cells(summary: dict[str, Any], modes: Sequence[str], linked: str) -> list[float | bool | None]:
    """A line of the table, of one prompt's summary or of all."""
    ratios = [summary["speedup"], *([summary["speedup_over_raw"]] if "raw" in modes else [])]
    accepted = summary["acceptance_length"]
    return [
        *summary["tok_s"].values(),
        *ratios,
        accepted,
        summary["link_utilization"][linked],
        summary["identical"],
    ]


def _acceptance_length(runs: Sequence[Run]) -> float | None:
    """Tokens per step over all steps of the runs, not the mean of the runs' means; None without a step."""
    steps = sum(run["steps"] for run in runs)
    return sum(run["acceptance_length"] * run["steps"] for run in runs) / steps if steps else None


def _wasted_share(runs: Sequence[Run]) -> float | None:
    """Wasted seconds ÷ all seconds of drafting; None where nobody counted them, or nothing was drafted."""
    counted = [run for run in runs if run["wasted_s"] is not None]
    drafting_s = sum(run["draft_s"] + run["gap_s"] for run in counted)
    return sum(run["wasted_s"] for run in counted) / drafting_s if drafting_s else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _median(values: Sequence[float | None]) -> float | None:
    usable = [value for value in values if value is not None and _is_positive(value)]
    return statistics.median(usable) if usable else None


def _is_positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _value(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join("  " + json.dumps(one, allow_nan=False) for one in value) + "\n]"
    return json.dumps(value, allow_nan=False)


def _cell(value: float | bool | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.2f}"
