"""Check everything that needs a GPU, on a machine that has one, and write one report to send back.

    make gpu-check [MODEL=path] [VRAM=8GiB]
    python benchmarks/gpu_check.py [--model MODEL] [--vram SIZE] [--ram SIZE] [--out gpu-report.json]

The stages: what the machine is; the tests that need a device (contract of the backend, races under slowed
copies, torch's sanitizer, hidden waits, memory over hundreds of steps, the CPU's text, every kernel);
``subspec doctor``; speeds of the link and of the kernels; plain against speculative decoding of the model.
Whatever a stage does, the next one runs.  Exits with 0 if all went well, 1 if a stage did not, and 2 where
torch finds no CUDA device.  Runs each stage in a process of its own, and itself imports nothing of them.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
TAIL_CHARACTERS = 6000
NO_DEVICE = 2
PROMPTS = (
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Explain how a refrigerator works, step by step.",
    "Write a Python function that merges two sorted lists, and explain it.",
)


@dataclass(frozen=True)
class Stage:
    """A process to run.

    Attributes:
        name: of its entry in the report.
        command: what runs.
        timeout_s: after which it is ended, with all that it started.
        result: the file it writes, JSON or JUnit's XML, if it writes one.
        environment: variables beside this process's own.
    """

    name: str
    command: Sequence[str]
    timeout_s: float
    result: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code, None after a timeout; ``output``: standard output and error together.
        seconds: it took.
    """

    code: int | None
    output: str
    seconds: float


Runner = Callable[[Stage], Ended]


def run(stage: Stage) -> Ended:
    """Run a stage to its end, or to its timeout."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                stage.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, **stage.environment},
                start_new_session=True,
            )
        except OSError as error:
            return Ended(127, str(error), 0.0)
        try:
            code: int | None = process.wait(stage.timeout_s)
        except BaseException as error:  # an interrupted check leaves nothing running either
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ended(code, text, time.monotonic() - start)


def stages(options: argparse.Namespace, folder: Path) -> list[Stage]:
    """All stages, in order; the first says what the machine is."""
    python = sys.executable
    figures = str(ROOT / "benchmarks" / "gpu_figures.py")
    budgets = [
        part for name in ("vram", "ram") if (size := getattr(options, name)) for part in (f"--{name}", size)
    ]
    given = {"SUBSPEC_GPU_MODEL": options.model}
    if options.vram:
        given["SUBSPEC_GPU_VRAM"] = options.vram
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [prompt]}) + "\n" for prompt in PROMPTS))
    tests, speeds, bench = folder / "tests.xml", folder / "figures.json", folder / "bench.json"
    subspec = [python, "-c", "from subspec.cli.main import main; main()"]
    return [
        Stage(
            "machine",
            [python, figures, "--machine", str(folder / "machine.json")],
            300,
            folder / "machine.json",
        ),
        Stage(
            "tests",
            [python, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={tests}", "-p", "no:cacheprovider"],
            3600,
            tests,
            given,
        ),
        Stage("doctor", [*subspec, "doctor"], 900),
        Stage("figures", [python, figures, str(speeds)], 1800, speeds),
        Stage(
            "bench",
            [
                *subspec,
                "bench",
                options.model,
                str(prompts),
                "--device",
                "cuda",
                *budgets,
                "--out",
                str(bench),
            ],
            5400,
            bench,
        ),
    ]


def check(planned: Sequence[Stage], runner: Runner, tell: Callable[[str], None]) -> dict[str, Any]:
    """Run the stages, and gather the report.  Without a device only the first one runs."""
    report: dict[str, Any] = {"device": None, "stages": []}
    for number, stage in enumerate(planned):
        tell(f"{stage.name}: {shlex.join(stage.command)}")
        entry = _entry(stage, runner(stage))
        report["stages"].append(entry)
        tell(f"{stage.name}: {entry['outcome']} after {entry['seconds']:.0f} s")
        if number == 0:
            report["device"] = (entry["result"] or {}).get("device")
            if report["device"] is None:
                break
    report["text"] = summary(report)
    return report


def _entry(stage: Stage, ended: Ended) -> dict[str, Any]:
    """A stage's entry in the report."""
    outcome = "ok" if ended.code == 0 else "timed out" if ended.code is None else "failed"
    result, problem = _result(stage)
    if outcome == "ok" and problem is not None:
        outcome = "failed"
    output = ended.output if problem is None else f"{ended.output}\n{problem}"
    return {
        "name": stage.name,
        "command": _without_home(shlex.join(stage.command)),
        "outcome": outcome,
        "code": ended.code,
        "seconds": ended.seconds,
        "result": result,
        "tail": _without_home(output[-TAIL_CHARACTERS:]),
    }


def _result(stage: Stage) -> tuple[Any, str | None]:
    """What a stage wrote, and what is wrong with it."""
    if stage.result is None:
        return None, None
    if not stage.result.exists():
        return None, f"{stage.result.name} was not written"
    text = stage.result.read_text()
    try:
        return (outcomes(text) if stage.result.suffix == ".xml" else json.loads(text)), None
    except (ValueError, ElementTree.ParseError) as error:
        return None, f"{stage.result.name} cannot be read: {error}"


def outcomes(xml: str) -> list[dict[str, Any]]:
    """Each test of a JUnit file: name, outcome, seconds, and the end of what went wrong."""
    found = []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
        told = "\n".join(f"{child.get('message') or ''}\n{child.text or ''}" for child in bad)
        found.append(
            {
                "test": f"{case.get('classname')}::{case.get('name')}",
                "outcome": bad[0].tag if bad else "passed",
                "seconds": float(case.get("time") or 0),
                "told": _without_home(told.strip()[-TAIL_CHARACTERS:]),
            }
        )
    return found


def summary(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"device: {report['device'] or 'no CUDA device'}"]
    for entry in report["stages"]:
        lines.append(f"{entry['name']:<8} {entry['outcome']}, {entry['seconds']:.0f} s")
        if entry["name"] == "tests" and entry["result"]:
            counts: dict[str, int] = {}
            for test in entry["result"]:
                counts[test["outcome"]] = counts.get(test["outcome"], 0) + 1
            lines[-1] += ": " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
            bad = [test["test"] for test in entry["result"] if test["outcome"] in ("failure", "error")]
            lines += [f"         {name}" for name in bad]
        elif entry["name"] == "bench" and entry["result"]:
            lines[-1] += f": {json.dumps(entry['result'].get('summary'))}"
        elif entry["outcome"] != "ok":
            lines += [f"         {line}" for line in entry["tail"].strip().splitlines()[-3:]]
    return "\n".join(lines)


def exit_code(report: dict[str, Any]) -> int:
    """0: all went well; 1: a stage did not; 2: there is no device."""
    if report["device"] is None:
        return NO_DEVICE
    return int(any(entry["outcome"] != "ok" for entry in report["stages"]))


def _without_home(text: str) -> str:
    """A text that can be sent: without the name of whoever ran it."""
    return text.replace(str(Path.home()), "~") if Path.home() != Path("/") else text


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo", help="path or hub id  [default: the demo model]")
    parser.add_argument("--vram", help="most that may be held in the device's memory")
    parser.add_argument("--ram", help="most that may be pinned behind it")
    parser.add_argument("--out", type=Path, default=Path("gpu-report.json"), help="the report to write")
    options = parser.parse_args()
    if problem := _unusable(options):
        sys.stderr.write(f"error: {problem}\n")
        return NO_DEVICE
    with tempfile.TemporaryDirectory(prefix="subspec-gpu-check-") as folder:
        report = check(stages(options, Path(folder)), run, _say)
    record = json.dumps({**report, "options": vars(options)}, indent=1, default=str)
    options.out.write_text(_without_home(record) + "\n")
    _say(f"\n{report['text']}\n")
    if report["device"] is None:
        sys.stderr.write(
            f"error: no CUDA device was found, and this check is about one ({options.out} has why)\n"
        )
    else:
        _say(f"The report is in {options.out}: please send it back.")
    return exit_code(report)


def _unusable(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, before anything runs that would be lost."""
    for name in ("vram", "ram"):
        size = getattr(options, name)
        if size is not None and not re.fullmatch(r"\s*[0-9]*\.?[0-9]+\s*[A-Za-z]*\s*", size):
            return f"--{name} {size} is not a size: write for example 8GiB"
    if not options.out.absolute().parent.is_dir():
        return f"--out {options.out}: there is no such directory"
    return None


def _say(line: str) -> None:
    """Tell how far it is."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
