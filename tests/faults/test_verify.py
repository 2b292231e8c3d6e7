"""``subspec verify``: proves a good store, and names the file and the tensors of a bad one."""

import json
import random
import re
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from budgets import least_budget
from safetensors.torch import load_file
from tiny import write_tiny
from typer.testing import CliRunner

from subspec import LLM, SamplingParams
from subspec.cli.main import app
from subspec.errors import StoreError
from subspec.store.manifest import FILE_NAME, Manifest
from subspec.store.prepare import prepare
from subspec.store.verify import Finding, verify

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["bf16-tied", "fp16-untied", "fp32-untied", "bf16-raw"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dtype, form = request.param.split("-")
    place = tmp_path_factory.mktemp(request.param)
    model = write_tiny(
        place / "model",
        "qwen2",
        {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype],
        tie_word_embeddings=form == "tied",
        vocab_size=700,
    )
    return prepare(model, store=place / "store", stream="raw" if form == "raw" else None)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x20
    path.write_bytes(content)


def findings(store: Path) -> dict[str, Finding]:
    return {finding.tensor: finding for finding in verify(store)}


def test_a_good_store_gives_every_tensor_of_its_checkpoint(good: Path) -> None:
    found = findings(good)
    assert set(found) == set(load_file(good.parent / "model" / "model.safetensors"))
    assert all(finding.good and finding.source == "checkpoint" for finding in found.values())
    assert len({finding.expected for finding in found.values()}) > len(found) // 2


@pytest.mark.parametrize("change", ["gone", "touched"])
def test_without_its_checkpoint_a_store_is_proved_by_its_manifest(
    good: Path, tmp_path: Path, change: str
) -> None:
    shutil.copytree(good.parent / "model", tmp_path / "model")
    codec = Manifest.read(good).codec
    store = prepare(tmp_path / "model", store=tmp_path / "store", stream=codec)
    expected = {name: finding.expected for name, finding in findings(good).items()}
    if change == "gone":
        shutil.rmtree(tmp_path / "model")
    else:
        (tmp_path / "model" / "model.safetensors").touch()
    found = findings(store)
    assert {name: finding.expected for name, finding in found.items()} == expected
    assert all(finding.good and finding.source == "manifest" for finding in found.values())


def test_a_flipped_bit_is_reported_with_file_and_tensors(good: Path, tmp_path: Path) -> None:
    rng, store = random.Random(1), tmp_path / "store"
    shutil.copytree(good, store)
    for name, record in Manifest.read(good).files.items():
        if name.startswith("tokenizer"):
            continue
        flip(store / name, rng.randrange(record.n_bytes))
        bad = {tensor: finding for tensor, finding in findings(store).items() if not finding.good}
        assert bad, name
        assert all(name in finding.problem for finding in bad.values()), name
        if name.startswith("layer-"):
            assert all(f".layers.{int(name[6:10])}." in tensor for tensor in bad)
        elif name.startswith("head-"):
            assert {"lm_head.weight", "model.embed_tokens.weight"} & set(bad)
        shutil.copyfile(good / name, store / name)


def test_bits_whose_checksums_were_made_to_match_are_found_all_the_same(good: Path, tmp_path: Path) -> None:
    """Nearly every bit of an image is a weight's; the rest is padding."""
    store = tmp_path / "store"
    shutil.copytree(good, store)
    names = Manifest.read(store).files
    name = next(name for name in names if re.match(r"layer-0001\.(residual|exact)", name))
    path, found, tried = store / name, 0, 12
    for turn in range(tried):
        offset = 4096 + (path.stat().st_size - 8192) * turn // tried
        flip(path, offset)
        data = json.loads((store / FILE_NAME).read_text())
        del data["crc32"]
        data["files"][name]["crc32"] = zlib.crc32(path.read_bytes())
        data["crc32"] = zlib.crc32(json.dumps(data, sort_keys=True).encode())
        (store / FILE_NAME).write_text(json.dumps(data))
        bad = [finding for finding in findings(store).values() if not finding.good]
        assert all(".layers.1." in one.tensor and one.rebuilt not in (None, one.expected) for one in bad)
        found += len(bad) == 1
        flip(path, offset)
    assert found >= tried - 3


def test_the_command_says_what_it_found(good: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    clean = runner.invoke(app, ["verify", str(good)])
    assert clean.exit_code == 0
    assert "of the checkpoint" in clean.stderr
    lines = clean.stdout.splitlines()
    assert len(lines) == len(findings(good))
    assert all(line.startswith("ok ") for line in lines)
    store = tmp_path / "store"
    shutil.copytree(good, store)
    flip(store / "layer-0002.substitute", 100)
    broken = runner.invoke(app, ["verify", str(store), "--json"])
    assert broken.exit_code == 1
    assert "layer-0002.substitute is damaged" in broken.stderr
    assert any(not one["good"] for one in json.loads(broken.stdout))
    assert runner.invoke(app, ["verify", str(tmp_path)]).exit_code == 2


def test_paranoia_notices_what_changes_after_the_first_sweep(good: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(good, store)
    image = next(store.glob("layer-0001.[er]*"))
    least, _ = least_budget(store, context=64)
    for paranoid in (False, True):
        with LLM(store, least, context=64, paranoid=paranoid) as llm:
            assert not llm.plan.resident_layers
            params = SamplingParams(3, ignore_eos=True)
            llm.generate([5, 6, 7], params)
            flip(image, 5000)
            llm.reset()
            if paranoid:
                with pytest.raises(StoreError, match="layer-0001.* is damaged"):
                    llm.generate([5, 6, 7], params)
            else:
                llm.generate([5, 6, 7], params)
            flip(image, 5000)
