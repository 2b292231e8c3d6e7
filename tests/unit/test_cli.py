"""The command line: arguments in, text and exit status out."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_llm import FakeLLM
from typer.testing import CliRunner

from subspec.cli import doctor, reference
from subspec.cli.main import app
from subspec.cli.options import Device
from subspec.cli.progress import TerminalProgress
from subspec.errors import BudgetError
from subspec.generation import Result
from subspec.planning.device import DEVICES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeLLM]]:
    monkeypatch.setattr("subspec.generation.LLM", FakeLLM, raising=False)
    FakeLLM.instances.clear()
    yield FakeLLM
    assert all(one.closed for one in FakeLLM.instances)


def run(*args: str, stdin: str = "", status: int = 0) -> Any:
    outcome = CliRunner().invoke(app, list(args), input=stdin)
    if outcome.exception and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    assert outcome.exit_code == status, outcome.output
    return outcome


def test_help_page_is_true() -> None:
    assert (DOCS / "cli.md").read_text() == reference.render(), (
        "python -m subspec.cli.reference > docs/cli.md"
    )


def test_help_imports_no_torch() -> None:
    program = (
        "import sys, subspec.cli.main; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_version() -> None:
    assert run("--version").stdout.startswith("subspec 0.")


def test_generate_streams_text_to_stdout_and_statistics_to_stderr() -> None:
    outcome = run("generate", "model", "Hello", "--max-new-tokens", "3", "--memory", "1GiB")
    assert outcome.stdout == "word0 word1 word2 \n"
    assert "4.00 tok/s" in outcome.stderr
    assert "acceptance length 4.0" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_generate_hands_every_option_on() -> None:
    run(
        *("generate", "model", "Hello", "--system", "Be brief.", "--seed", "7", "--temperature", "0.5"),
        *("--top-k", "9", "--top-p", "0.9", "--min-p", "0.1", "--repetition-penalty", "1.2", "--stop", "a"),
        *(
            "--stop",
            "b",
            "--mode",
            "plain",
            "--depth",
            "5",
            "--width",
            "2",
            "--nodes",
            "6",
            "--context",
            "99",
        ),
        *("--draft-temperature", "0.3", "--dtype", "float32", "--store", "there", "--memory", "1GiB"),
    )
    (one,) = FakeLLM.instances
    question, params, mode = one.calls[0]
    assert question == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert (params.seed, params.temperature, params.top_k, params.top_p) == (7, 0.5, 9, 0.9)
    assert (params.min_p, params.repetition_penalty, params.stop) == (0.1, 1.2, ("a", "b"))
    assert (one.memory, mode) == ("1GiB", "plain")
    given = {"depth": 5, "width": 2, "nodes": 6, "context": 99, "draft_temperature": 0.3, "dtype": "float32"}
    assert {name: one.choices[name] for name in given} == given
    assert one.choices["store"] == Path("there")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_tiers_of_a_device_are_handed_on(command: str) -> None:
    given = ("--device", "emulated", "--vram", "1GiB", "--ram", "2GiB")
    run(command, "model", *given, stdin="hello\n")
    (one,) = FakeLLM.instances
    assert (one.choices["device"], one.choices["vram"], one.choices["ram"]) == ("emulated", "1GiB", "2GiB")
    assert type(one.choices["device"]) is str


def test_bench_takes_the_tiers_of_a_device_in_the_place_of_a_memory(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": 1, "turns": ["one"]}\n')
    run("bench", "model", "--prompts", str(prompts), "--device", "cuda", "--vram", "1GiB", "--ram", "2GiB")
    for one in FakeLLM.instances:
        assert (one.choices["device"], one.choices["vram"], one.choices["ram"]) == ("cuda", "1GiB", "2GiB")
        assert one.memory == "auto"


@pytest.mark.parametrize(
    ("given", "memory", "vram"),
    [
        ((), "200MiB", None),
        (("--memory", "1GiB"), "1GiB", None),
        (("--vram", "1GiB", "--device", "emulated"), "auto", "1GiB"),
    ],
)
def test_demo_has_a_memory_of_its_own_unless_told(
    given: tuple[str, ...], memory: str, vram: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subspec.checkpoint.embedded.fetch_demo", lambda say: None)
    run("demo", *given)
    (one,) = FakeLLM.instances
    assert (one.memory, one.choices.get("vram")) == (memory, vram)


def test_the_devices_offered_are_those_that_are_known() -> None:
    assert tuple(Device) == DEVICES


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_generate_writes_a_trace(tmp_path: Path, form: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspec.cli.generate._record", lambda llm, result: {"text": result.text})
    trace = tmp_path / "trace.json"
    run("generate", "model", "Hello", "--trace", str(trace), *form)
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize("place", ["missing/trace.json", "."])
def test_a_trace_that_cannot_be_written_is_an_error_before_the_model_loads(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run("generate", "model", "Hello", "--trace", str(tmp_path / place), status=2)
    assert not FakeLLM.instances
    assert "error: the trace" in outcome.output
    assert "cannot be written" in outcome.output


@pytest.mark.parametrize("arguments", [["-"], []])
def test_generate_reads_standard_input(arguments: list[str]) -> None:
    run("generate", "model", *arguments, stdin="from a pipe\n")
    assert FakeLLM.instances[0].calls[0][0] == [{"role": "user", "content": "from a pipe"}]


def test_raw_takes_the_text_as_it_is() -> None:
    run("generate", "model", "-", "--raw", stdin="as it is\n")
    assert FakeLLM.instances[0].calls[0][::2] == ("as it is\n", "raw")


def test_generate_json_is_one_run_and_its_text() -> None:
    record = json.loads(run("generate", "model", "Hello", "--json", "--max-new-tokens", "2").stdout)
    assert record["text"] == "word0 word1"
    assert record["token_ids"] == [0, 1]
    assert record["budget_bytes"] == 100 << 20
    assert record["peak_bytes"] > 0
    assert record["link_utilization"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "model", "   "], "the prompt is empty"),
        (["generate", "model", "x", "--raw", "--system", "y"], "--system"),
        (["generate", "model", "x", "--top-p", "3"], "top_p"),
        (["bench", "model", "--memory", "1GiB", "--prompts", "missing.jsonl"], "cannot read the prompts"),
        (["bench", "model", "--prompts", "missing.jsonl"], "give --memory"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments: list[str], message: str) -> None:
    outcome = run(*arguments, status=2)
    assert outcome.stderr.startswith("error: ")
    assert message in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert outcome.stdout == ""


def test_wrong_usage_is_status_2() -> None:
    run("generate", "model", "x", "--depht", "3", status=2)
    run("generate", "model", "x", "--mode", "fast", status=2)


@pytest.mark.parametrize(("error", "status"), [(BudgetError("too little"), 2), (KeyboardInterrupt(), 130)])
def test_exit_status_of_exceptions(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(FakeLLM, "generate", fail)
    outcome = run("generate", "model", "x", "--json", status=status)
    assert outcome.stdout == ""
    assert outcome.stderr == ("error: too little\n" if status == 2 else "")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLLM, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("generate", "model", "x", "--json")


def test_chat_works_with_piped_input() -> None:
    outcome = run(
        "chat", "model", "--max-new-tokens", "2", stdin="hello\n\n/stats\n/nonsense\n/exit\nunread\n"
    )
    assert outcome.stdout.startswith("word0 word1 \nlast answer: 2 tokens")
    assert "unknown command /nonsense" in outcome.stderr
    assert len(FakeLLM.instances[0].calls) == 1


def test_bench_writes_a_record_and_fails_on_different_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": 5, "turns": ["one"]}\n{"id": 6, "turns": ["two"]}\n')
    out = tmp_path / "result.json"
    options = ["--memory", "1GiB", "--prompts", str(prompts), "--max-new-tokens", "8"]
    outcome = run("bench", "model", *options, "--plain-max-new-tokens", "3", "--out", str(out))
    record = json.loads(out.read_text())
    assert [(run["prompt_id"], run["mode"], run["new_tokens"]) for run in record["runs"]] == [
        (5, "plain", 3), (5, "speculative", 8), (6, "plain", 3), (6, "speculative", 8),
    ]  # fmt: skip
    assert record["summary"]["speedup"] == 4.0
    assert record["summary"]["identical"] is True
    named = {
        "command",
        "commit",
        "versions",
        "machine",
        "model",
        "budget_bytes",
        "peak_bytes",
        "runs",
        "summary",
    }
    assert named <= record.keys()
    assert "4.00" in outcome.stdout

    honest = FakeLLM.generate

    def forge(self: FakeLLM, *args: Any, **choices: Any) -> Result:
        whole = honest(self, *args, **choices)
        whole.token_ids[-1] += choices["mode"] == "plain"
        return whole

    monkeypatch.setattr(FakeLLM, "generate", forge)
    outcome = run("bench", "model", *options, status=1)
    assert json.loads(outcome.stdout)["summary"]["identical"] is False
    assert "error: the modes gave different tokens" in outcome.stderr


def test_bench_refuses_an_output_place_before_it_runs(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"turns": ["one"]}\n')
    place = str(tmp_path / "missing" / "out.json")
    run("bench", "model", "--memory", "1GiB", "--prompts", str(prompts), "--out", place, status=2)
    assert not FakeLLM.instances


def test_doctor_reports_as_text_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_BYTES", 4 << 20)
    monkeypatch.setattr(doctor, "_SHAPES", ((64, 64),))
    findings = json.loads(run("doctor", "--json", "--store", str(tmp_path / "not" / "yet")).stdout)
    assert findings["versions"]["torch"]
    assert findings["kernels"]["level"]
    assert set(findings["exact_product"]) == {"bfloat16", "float16", "float32"}
    lasting = [one for one in findings["disk"]["measurements"] if one["lasting"]]
    assert findings["disk"]["read_bytes_per_s"] == lasting[0]["bytes_per_s"] > 0
    assert (len(lasting), len(findings["disk"]["measurements"])) == (1, 10)  # longer, of the best of nine
    assert list(tmp_path.iterdir()) == []
    text = run("doctor", "--store", str(tmp_path)).stdout
    assert "GB/s" in text
    assert findings["kernels"]["level"] in text


def test_doctor_tells_of_hazard_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(doctor, "_SHAPES", ((64, 64),))
    monkeypatch.delenv("SUBSPEC_HAZARDS", raising=False)
    assert "hazards       not checked" in run("doctor", "--store", str(tmp_path)).stdout
    monkeypatch.setenv("SUBSPEC_HAZARDS", "1")
    text = run("doctor", "--store", str(tmp_path)).stdout
    assert "hazards       checked in every run" in text
    assert "SUBSPEC_HAZARDS checks the order of every access" in text


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalProgress(delay_s=0.0) as progress:
        progress("work", 1, 2)
        progress("work", 2, 2)
    assert capsys.readouterr() == ("", "")


def test_progress_appears_on_a_terminal_after_its_delay(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with TerminalProgress(delay_s=1000.0) as progress:
        progress("slow", 0, 2)
        progress("slow", 1, 2)
    assert capsys.readouterr().err == ""
    with TerminalProgress(delay_s=0.0) as progress:
        progress("slow", 0, 2)
        progress("slow", 1, 2)
        progress("slow", 2, 2)
    assert "slow" in capsys.readouterr().err
