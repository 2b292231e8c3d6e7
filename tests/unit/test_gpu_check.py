"""The machinery of ``make gpu-check``, with stages that fail, hang, or find no device."""

import argparse
import json
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
gpu_check = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "gpu_check.py")))
XML = """<testsuites><testsuite>
<testcase classname="tests.gpu.a" name="good" time="0.5"/>
<testcase classname="tests.gpu.a" name="bad" time="1">
  <failure message="assert 1 == 2">the trace</failure></testcase>
<testcase classname="tests.gpu.b" name="none" time="0"><skipped message="no CUDA device"/></testcase>
</testsuite></testsuites>"""


def stage(name: str, code: str, *, timeout_s: float = 60, result: Path | None = None) -> Any:
    return gpu_check.Stage(name, [sys.executable, "-c", code], timeout_s, result)


def machine(folder: Path, device: str | None) -> Any:
    """A first stage that finds a device, or none."""
    path = folder / "machine.json"
    code = f"open({str(path)!r}, 'w').write({json.dumps({'device': device})!r})"
    return stage("machine", code, result=path)


def checked(*stages: Any) -> dict[str, Any]:
    report: dict[str, Any] = gpu_check.check(stages, gpu_check.run, lambda line: None)
    return report


def outcomes(report: dict[str, Any]) -> list[str]:
    return [entry["outcome"] for entry in report["stages"]]


def test_all_is_well(tmp_path: Path) -> None:
    report = checked(machine(tmp_path, "a GPU (sm_89)"), stage("one", "print('fine')"))
    assert outcomes(report) == ["ok", "ok"]
    assert report["stages"][1]["tail"] == "fine\n"
    assert gpu_check.exit_code(report) == 0


def test_after_a_failed_stage_the_next_one_runs(tmp_path: Path) -> None:
    fails = stage("fails", "import sys; print('x' * 9999); print('why', file=sys.stderr); sys.exit(3)")
    missing = gpu_check.Stage("missing", ["/nowhere/program"], 60)
    report = checked(machine(tmp_path, "a GPU"), fails, missing, stage("last", ""))
    assert outcomes(report) == ["ok", "failed", "failed", "ok"]
    assert report["stages"][1]["code"] == 3
    assert report["stages"][1]["tail"].endswith("why\n")
    assert len(report["stages"][1]["tail"]) == gpu_check.TAIL_CHARACTERS
    assert "fails    failed" in report["text"]
    assert gpu_check.exit_code(report) == 1


def test_a_stage_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(alive)!r}).touch()"
    command = repr([sys.executable, "-c", child])
    hangs = f"import subprocess; print('began', flush=True); subprocess.run({command})"
    report = checked(machine(tmp_path, "a GPU"), stage("hangs", hangs, timeout_s=1), stage("last", ""))
    assert outcomes(report) == ["ok", "timed out", "ok"]
    assert "began" in report["stages"][1]["tail"]
    time.sleep(2.5)
    assert not alive.exists()
    assert gpu_check.exit_code(report) == 1


@pytest.mark.parametrize("first", ["finds none", "fails"])
def test_without_a_device_it_says_so_and_stops(tmp_path: Path, first: str) -> None:
    begins = (
        machine(tmp_path, None) if first == "finds none" else stage("machine", "import nothing_of_the_kind")
    )
    report = checked(begins, stage("never", ""))
    assert len(report["stages"]) == 1
    assert "no CUDA device" in report["text"]
    assert gpu_check.exit_code(report) == 2


@pytest.mark.parametrize("wrote", [None, "{"])
def test_a_stage_without_its_result_failed(tmp_path: Path, wrote: str | None) -> None:
    path = tmp_path / "result.json"
    if wrote is not None:
        path.write_text(wrote)
    report = checked(machine(tmp_path, "a GPU"), stage("silent", "", result=path))
    assert outcomes(report) == ["ok", "failed"]
    assert "result.json" in report["stages"][1]["tail"]


def test_each_tests_outcome_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "tests.xml"
    code = f"import sys; open({str(path)!r}, 'w').write({XML!r}); sys.exit(1)"
    report = checked(machine(tmp_path, "a GPU"), stage("tests", code, result=path))
    assert [(test["test"], test["outcome"]) for test in report["stages"][1]["result"]] == [
        ("tests.gpu.a::good", "passed"),
        ("tests.gpu.a::bad", "failure"),
        ("tests.gpu.b::none", "skipped"),
    ]
    assert report["stages"][1]["result"][1]["told"] == "assert 1 == 2\nthe trace"
    assert "1 failure, 1 passed, 1 skipped" in report["text"]
    assert "         tests.gpu.a::bad" in report["text"]


def test_the_report_does_not_say_who_ran_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/somebody"))
    report = checked(machine(tmp_path, "a GPU"), stage("one", "print('/home/somebody/models')"))
    assert report["stages"][1]["tail"] == "~/models\n"


def test_the_stages_cover_tests_doctor_figures_and_bench(tmp_path: Path) -> None:
    options = argparse.Namespace(model="models/one", vram="8GiB", ram=None)
    planned = {one.name: one for one in gpu_check.stages(options, tmp_path)}
    assert list(planned) == ["machine", "tests", "doctor", "figures", "bench"]
    assert planned["tests"].environment == {"SUBSPEC_GPU_MODEL": "models/one", "SUBSPEC_GPU_VRAM": "8GiB"}
    assert "--vram 8GiB" in " ".join(planned["bench"].command)
    assert "--ram" not in planned["bench"].command
    assert len((tmp_path / "prompts.jsonl").read_text().splitlines()) == 3


def test_the_command_says_that_there_is_no_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    out = tmp_path / "gpu-report.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(out)])
    assert gpu_check.main() == 2
    told = capsys.readouterr()
    assert "no CUDA device" in told.err
    report = json.loads(out.read_text())
    assert report["device"] is None
    assert report["stages"][0]["result"]["torch"] == torch.__version__
