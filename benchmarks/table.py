"""Write the README's table of results from the files in ``benchmarks/results``.

python benchmarks/table.py           # rewrites the README's table
python benchmarks/table.py --print   # prints it
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
HEADER = (
    "| model, bf16 | budget | kernels | disk reads | streams | temperature "
    "| offloading tok/s | plain tok/s | speculative tok/s "
    "| over offloading: median (least) | acceptance length | sweep, raw ÷ residual | link use | identical |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)
NOTE = """
Each row is one `subspec bench` run of {prompts} prompts, the modes in turn on each, in a process whose
memory, page cache included, is capped at the budget plus 700 MiB; of several runs of a kind, the last.
*Offloading* (the mode `raw`) is plain decoding that streams the weights as they are: the same engine at
the same budget, with the same prefetch and a one-node tree. *Streams* says what the modes plain and
speculative stream; where that is raw weights too (`--stream raw`), plain decoding is the offloading,
hence the dashes. Speed-ups and sweep ratios are medians of the per-prompt ratios. *Acceptance length*:
the tokens that a sweep commits. *Link*: the way that weights stream over, here from the disk; its use is
what offloading streamed, of what the disk could have delivered meanwhile. *Identical*: all modes gave the
same tokens. Command, commit, versions and every raw time are in [benchmarks/results](benchmarks/results);
`python benchmarks/table.py` writes this table.
"""


def row(result: dict[str, Any]) -> str:
    """One result file as a line of the table."""
    summary, runs = result["summary"], result["runs"]
    throttle = result["machine"]["disk_throttle"]
    reads = f"capped at {throttle[0]['read_bytes_per_s'] / 1e9:.1f} GB/s" if throttle else "uncapped"
    reads += f" ({result['link_bytes_per_s'] / 1e9:.2f} measured)"
    streams, tok_s = result["model"]["codec"], summary["tok_s"]
    if streams == "raw":
        offloading, over, plain, ratio = "plain", "speedup", "–", "–"
    else:
        offloading, over = "raw", "speedup_over_raw"
        plain, ratio = f"{tok_s['plain']:.2f}", f"{summary['sweep_ratio']:.2f}"
    slow = {run["prompt_id"]: run["tok_s"] for run in runs if run["mode"] == offloading}
    ratios = [
        run["tok_s"] / slow[run["prompt_id"]]
        for run in runs
        if run["mode"] == "speculative" and slow[run["prompt_id"]] and run["tok_s"]
    ]
    cells = [
        result["model"]["name"].removesuffix("-bf16"),
        f"{result['budget_bytes'] / 2**20:.0f} MiB",
        result["machine"]["kernels"],
        reads,
        streams,
        f"{result['settings']['temperature'] or 0:g}",
        f"{tok_s[offloading]:.2f}",
        plain,
        f"{tok_s['speculative']:.2f}",
        f"**{summary[over]:.1f}×** ({min(ratios):.1f}×)",
        f"{summary['acceptance_length']:.1f}",
        ratio,
        f"{summary['link_utilization'][offloading]:.2f}",
        "yes" if summary["identical"] else "NO",
    ]
    return "| " + " | ".join(cells) + " |\n"


def kind(result: dict[str, Any]) -> tuple[Any, ...]:
    """What two runs must share to be runs of the same thing."""
    model, machine = result["model"], result["machine"]
    limits = tuple(one["read_bytes_per_s"] for one in machine["disk_throttle"])
    how = (machine["kernels"], limits, result["settings"]["temperature"] or 0)
    return (model["name"], model["codec"], result["budget_bytes"], *how)


def last_runs(paths: list[Path]) -> list[dict[str, Any]]:
    """Of each kind the result whose file's name ends in the highest ``-runN``, in name order."""
    runs = {path: int(found[1]) if (found := re.search(r"-run(\d+)$", path.stem)) else 1 for path in paths}
    last: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}
    for path in sorted(paths, key=lambda path: (runs[path], path)):
        result = json.loads(path.read_text())
        last[kind(result)] = path, result
    return [result for _, result in sorted(last.values(), key=lambda pair: pair[0])]


def table() -> str:
    """The whole section, ends with a newline; empty without results."""
    results = last_runs(list((HERE / "results").glob("bench-*.json")))
    if not results:
        return ""
    prompts = sorted({len({run["prompt_id"] for run in result["runs"]}) for result in results})
    return HEADER + "".join(map(row, results)) + NOTE.format(prompts=" or ".join(map(str, prompts)))


def updated(readme: str) -> str:
    """The README's text with the section replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(table())
    else:
        README.write_text(updated(README.read_text()))
