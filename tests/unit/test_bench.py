"""The harness: which prompts, in which order, and what the figures say."""

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fake_llm import FakeLLM, result
from rich.console import Console

from subspec.bench import machine
from subspec.bench.link import CANDIDATES, LinkMeter, image_files
from subspec.bench.prompts import load_prompts
from subspec.bench.report import Run, same_tokens, summarize, table, to_json, write_json
from subspec.bench.runs import Settings, parse_modes, run_prompts, run_record
from subspec.errors import OptionError


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"id": n, "turns": [f"question {n}", "more"]}) + "\n" for n in range(10))
    )
    return path


def record(
    mode: str = "plain", tokens: int = 4, prompt_id: int = 1, speed: float | None = None, **choices: Any
) -> Run:
    return run_record(result(mode, tokens, **choices), prompt_id=prompt_id, link_bytes_per_s=speed)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1, [0]), (3, [0, 3, 6]), (5, [0, 2, 4, 6, 8]), (10, list(range(10))), (99, list(range(10)))],
)
def test_limit_takes_evenly_spaced_lines(prompts: Path, limit: int, expected: list[int]) -> None:
    chosen = load_prompts(prompts, limit)
    assert [prompt.prompt_id for prompt in chosen] == expected
    assert chosen[-1].text == f"question {expected[-1]}"


def test_prompts_without_id_are_numbered_and_blank_lines_skipped(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"turns": ["a"]}\n\n{"turns": ["b"]}\n')
    assert [prompt.prompt_id for prompt in load_prompts(path)] == [1, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no prompts"), ("{\n", "p.jsonl:1: not JSON"), ('{"turns": []}', "turns"), ("[1]", "turns")],
)
def test_bad_prompts_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(OptionError, match=message):
        load_prompts(path)


def test_limit_must_be_positive(prompts: Path) -> None:
    with pytest.raises(OptionError, match="--limit 0"):
        load_prompts(prompts, 0)


def test_modes() -> None:
    assert parse_modes(" speculative,plain,plain") == ("speculative", "plain")
    for text in ("", "plain,fast"):
        with pytest.raises(OptionError, match="--modes"):
            parse_modes(text)


@dataclass
class Speed:
    bytes_per_s: float
    direct: bool = True


def meter_with(tmp_path: Path, best: tuple[int, int]) -> LinkMeter:
    """A disk that gives ``best`` 1000 bytes/s for long, half again as much at first, and others 100.

    But for one stroke of luck.
    """
    (tmp_path / "layer.exact").write_bytes(bytes(8192))
    luck = iter([9e9])

    def read(_paths: Any, threads: int, request_bytes: int, total: int) -> Speed:
        if (threads, request_bytes) == best:
            return Speed(1000.0 if total > 8192 else 1500.0)
        return Speed(next(luck, 100.0) if threads == 1 else 100.0)

    return LinkMeter(tmp_path, settle_s=0.0, read=read)


def test_modes_take_turns_and_the_link_is_measured_between(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeLLM, "streamed_bytes", 500)
    meter = meter_with(tmp_path, CANDIDATES[4])
    llm: Any = FakeLLM("model")
    seen: list[tuple[int, int]] = []
    settings = Settings(max_new_tokens=6, plain_max_new_tokens=2, temperature=0.5, seed=3)
    runs = run_prompts(
        lambda _: llm,
        load_prompts(prompts, 2),
        settings,
        meter,
        lambda _, done, total: seen.append((done, total)),
    )
    assert [(one["prompt_id"], one["mode"], one["new_tokens"]) for one in runs] == [
        (0, "plain", 2), (0, "speculative", 6), (5, "plain", 2), (5, "speculative", 6),
    ]  # fmt: skip
    assert llm.resets == len(llm.calls) == 2 + 4
    assert {(call[1].seed, call[1].temperature, call[1].ignore_eos) for call in llm.calls} == {
        (3, 0.5, False)
    }
    assert [(one["threads"], one["request_bytes"]) for one in meter.measurements[:9]] == list(CANDIDATES)
    assert [one["lasting"] for one in meter.measurements] == [
        *[False] * 9, *[True] * 3, True, True, *[False] * 9, *[True] * 3,
    ]  # fmt: skip
    assert meter.lasting_bytes_per_s == 1000.0
    assert runs[0]["link_utilization"] == 500 / (1000.0 * 2.0)
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_nothing_streamed_means_nothing_measured(prompts: Path, tmp_path: Path) -> None:
    meter = meter_with(tmp_path, CANDIDATES[0])
    llm: Any = FakeLLM("model")
    runs = run_prompts(lambda _: llm, load_prompts(prompts, 1), Settings(), meter, lambda *_: None)
    assert meter.lasting_bytes_per_s is None
    assert [one["link_utilization"] for one in runs] == [None, None]


def test_short_reads_say_nothing_of_a_lasting_speed(tmp_path: Path) -> None:
    meter = meter_with(tmp_path, CANDIDATES[0])
    with pytest.raises(ValueError, match="empty"):
        meter.measure_lasting(1)
    meter.measure(len(CANDIDATES))
    assert meter.lasting_bytes_per_s is None


def test_only_streamed_images_are_measured(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    images = ["one/layer-0000.exact", "one/layer-0000.residual"]
    for name in (*images, "one/layer-0000.substitute", "one/tokenizer.json"):
        (tmp_path / name).write_bytes(bytes(10))
    assert image_files(tmp_path) == [tmp_path / name for name in images]


def test_a_run_has_the_fields_of_result_files() -> None:
    run = record("speculative", 4, speed=1000.0, streamed_bytes=1500, accepted=[2, 1])
    named = (
        "mode prompt_id new_tokens prefill_s decode_s tok_s acceptance_length steps sweeps streamed_bytes "
        "draft_s verify_s wait_s link_utilization token_ids"
    )
    assert set(named.split()) <= run.keys()
    assert run["link_utilization"] == 0.75
    assert run["accepted"] == [2, 1]


@pytest.mark.parametrize(
    ("plain", "speculative", "same"),
    [
        (record(tokens=4), record("speculative", 4), True),
        (record(tokens=2), record("speculative", 4), True),
        (record(tokens=2, finish_reason="eos"), record("speculative", 4), False),
        (record(tokens=4), record("speculative", 2, finish_reason="eos"), False),
        (record(tokens=0), record("speculative", 4), False),
        (record(tokens=3, finish_reason="eos"), record("speculative", 3, finish_reason="eos"), True),
    ],
)
def test_same_tokens(plain: Run, speculative: Run, same: bool) -> None:
    assert same_tokens(plain, speculative) is same


def test_one_different_token_is_seen() -> None:
    other = record("speculative")
    other["token_ids"][2] += 1
    assert not same_tokens(record(), other)
    runs = [
        record(prompt_id=1),
        record("speculative", prompt_id=1),
        record(prompt_id=2),
        {**other, "prompt_id": 2},
    ]
    assert summarize(runs)["identical"] is False


def test_speedup_is_the_median_of_ratios_not_the_ratio_of_medians() -> None:
    speeds = [(1.0, 10.0), (2.0, 4.0), (4.0, 12.0)]
    runs = []
    for prompt, (slow, fast) in enumerate(speeds):
        runs += [record(prompt_id=prompt, tok_s=slow), record("speculative", prompt_id=prompt, tok_s=fast)]
    summary = summarize(runs)
    assert summary["speedup"] == 3.0
    assert summary["tok_s"] == {"plain": 2.0, "speculative": 10.0}
    assert summary["identical"] is True


def test_acceptance_length_is_over_all_steps() -> None:
    runs = [
        record("speculative", steps=1, acceptance_length=20.0),
        record("speculative", prompt_id=2, steps=9, acceptance_length=10.0),
    ]
    assert summarize(runs)["acceptance_length"] == 11.0


def test_figures_that_runs_do_not_give_are_null() -> None:
    summary = summarize([record(tok_s=0.0, tokens=1)])
    assert summary["speedup"] is None
    assert summary["identical"] is None
    assert summary["acceptance_length"] is None
    assert summary["tok_s"] == {"plain": None}
    assert table([record(tok_s=0.0)], summary).row_count == 2


def test_a_terminal_of_80_columns_shows_the_table_whole() -> None:
    runs = [record(mode, tok_s=10.25, prompt_id=160) for mode in ("raw", "plain", "speculative")]
    console = Console(width=80, file=io.StringIO())
    console.print(table(runs, summarize(runs)))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    assert "speculative" in shown


def test_json_is_strict_and_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json({"runs": [record(), record()], "summary": {"identical": True}, "none": None}, path)
    assert json.loads(path.read_text())["runs"][1]["token_ids"] == [0, 1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json({"bad": float("nan")})


def test_settings_limit() -> None:
    settings = Settings(max_new_tokens=8)
    assert settings.limit("plain") == 8
    assert replace(settings, plain_max_new_tokens=3).limit("plain") == 3
    assert replace(settings, plain_max_new_tokens=3).limit("speculative") == 8


@pytest.mark.parametrize(
    ("line", "file", "text"),
    [
        ("7:blkio:/a/b", "blkio/a/blkio.throttle.read_bps_device", "8:16 1000000000\n"),
        ("0::/a/b", "a/b/io.max", "8:16 rbps=1000000000 wbps=max riops=120 wiops=max\n"),
        ("0::/a/b", "a/io.max", "8:0 rbps=max wbps=5\n8:16 rbps=1000000000 wbps=max\n"),
    ],
)
def test_disk_throttles_are_found_on_the_group_and_above(
    tmp_path: Path, line: str, file: str, text: str
) -> None:
    path = tmp_path / "groups" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    membership = tmp_path / "membership"
    membership.write_text(f"4:memory:/m\n{line}\n")
    found = machine.disk_throttle(tmp_path / "groups", membership)
    assert found == [{"device": "8:16", "read_bytes_per_s": 10**9, "group": "/a/b"}]


def test_no_throttle(tmp_path: Path) -> None:
    assert machine.disk_throttle(tmp_path, tmp_path / "missing") == []


def test_the_machine_is_described() -> None:
    found = machine.machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory"]["total_bytes"] > 0
    assert machine.versions()["torch"]
