"""Safetensors directories: read exactly, refused clearly."""

import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_weights, write_tiny

from subspec.checkpoint import open_checkpoint
from subspec.errors import ModelError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny", "qwen2")


def edit_header(file: Path, change: Any) -> None:
    """Rewrite a safetensors header in place, the data unchanged."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    edited = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(edited)) + edited + content[8 + size :])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_read_as_they_are(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    path = write_tiny(tmp_path / "my model", "llama", dtype, shards=shards)
    written: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        written |= load_file(file)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.name == "my-model"
        assert checkpoint.dtype == dtype
        assert checkpoint.tensors == {name: tuple(weight.shape) for name, weight in written.items()}
        for name, weight in written.items():
            assert torch.equal(checkpoint.read(name), weight)


def test_rows_equal_slices(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(model) as checkpoint:
        monkeypatch.setattr(type(checkpoint), "_chunk_elements", 3 * 64)
        whole = load_file(model / "model.safetensors")["lm_head.weight"]
        for start, stop in [(0, 0), (0, 1), (5, 17), (319, 320), (0, 320)]:
            assert torch.equal(checkpoint.read("lm_head.weight", start, stop), whole[start:stop])
        bias = load_file(model / "model.safetensors")["model.layers.1.self_attn.q_proj.bias"]
        assert torch.equal(checkpoint.read("model.layers.1.self_attn.q_proj.bias", 3), bias[3:])
        with pytest.raises(IndexError):
            checkpoint.read("lm_head.weight", 0, 321)
        with pytest.raises(KeyError):
            checkpoint.read("lm_head.bias")


def test_a_chosen_dtype_rounds(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    with open_checkpoint(model, torch.bfloat16) as checkpoint:
        assert checkpoint.dtype == torch.bfloat16
        for name, weight in weights.items():
            assert torch.equal(checkpoint.read(name), weight.to(torch.bfloat16))


def test_fp16_refuses_what_it_cannot_hold(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][3, 5] = 1e6
    save_file(weights, model / "model.safetensors")
    with open_checkpoint(model, torch.float16) as checkpoint:
        checkpoint.read("lm_head.weight", 0, 3)
        with pytest.raises(ModelError, match=r"lm_head.weight holds values that fp16 cannot"):
            checkpoint.read("lm_head.weight")
    with pytest.raises(ModelError, match=r"float64 are not supported; supported: bf16"):
        open_checkpoint(model, torch.float64)


def test_mixed_matrices_keep_every_bit(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.bfloat16)
    save_file(weights, model / "model.safetensors")
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.dtype == torch.float32


def test_end_of_text_ids_of_both_files_are_joined(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2, 9]}))
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.config["eos_token_id"] == [2, 5, 9]


def test_a_safetensors_file_means_its_directory(model: Path) -> None:
    with open_checkpoint(model / "model.safetensors") as checkpoint:
        assert checkpoint.path == model.resolve()


def test_identity_changes_with_time_size_header_and_config(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "tiny", "qwen2", shards=2)
    file = model / "model-00002-of-00002.safetensors"
    seen = []

    def identity() -> dict[str, Any]:
        with open_checkpoint(model) as checkpoint:
            first = checkpoint.identity()
            assert first == checkpoint.identity() == json.loads(json.dumps(first))
            assert first["kind"] == "safetensors"
            assert first["path"] == str(model.resolve())
            return first

    seen.append(identity())
    assert identity() == seen[0]
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
    seen.append(identity())
    time = file.stat().st_mtime_ns
    edit_header(file, lambda header: header.update(__metadata__={"note": "x"}))
    os.utime(file, ns=(time, time))
    seen.append(identity())
    edit_header(file, lambda header: header.update(__metadata__={"note": "y"}))
    os.utime(file, ns=(time, time))
    seen.append(identity())
    config = model / "config.json"
    state = config.stat()
    config.write_text(
        config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 511')
    )
    os.utime(config, ns=(state.st_mtime_ns, state.st_mtime_ns))
    seen.append(identity())
    (model / "tokenizer.json").write_text("{}")
    seen.append(identity())
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


def test_identity_sees_a_file_that_changed_after_opening(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        before = checkpoint.identity()
        os.utime(model / "model.safetensors", ns=(1, 1))
        assert checkpoint.identity() != before
        (model / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"model.safetensors"):
            checkpoint.identity()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "tiny", "llama", shards=3)
    (model / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of 3 shards: model-00002-of-00003.safetensors"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../outside.safetensors"}, "no plain file name"),
        ({"a": 3}, "has no weight_map"),
        ({}, "has no weight_map"),
        ({"a": "model.safetensors"}, "lacks 1 tensors of .* first a"),
    ],
)
def test_a_wrong_index_is_refused(model: Path, weight_map: dict[str, Any], message: str) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=message):
        open_checkpoint(model)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "tiny", "llama", shards=2)
    shutil.copy(model / "model-00001-of-00002.safetensors", model / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelError, match="lies in two of the files"):
        open_checkpoint(model)


def test_truncated_files_are_refused_with_numbers(model: Path) -> None:
    file = model / "model.safetensors"
    content = file.read_bytes()
    for size in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ModelError, match=rf"model.safetensors.* (truncated|corrupt).*{size}"):
            open_checkpoint(model)
    file.write_bytes(content + b"x")
    with pytest.raises(ModelError, match=rf"end at byte {len(content)}, but it has {len(content) + 1}"):
        open_checkpoint(model)


def test_a_file_truncated_after_opening_is_an_error_not_a_crash(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        os.truncate(model / "model.safetensors", 10_000)
        with pytest.raises(ModelError, match="is truncated: .* bytes are needed, it has 10000"):
            checkpoint.read("model.norm.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F8_E4M3"}, "lm_head.weight has type F8_E4M3; supported: F32, F16, BF16"),
        ({"shape": [320, 63]}, r"lm_head.weight \(320, 63\) F32 needs 80640 bytes, has 81920"),
        ({"shape": [-320, 64]}, "no whole number"),
        ({"shape": "many"}, "no whole number"),
        ({"data_offsets": [0]}, "not a tensor list"),
        ({"data_offsets": [0, 10**15]}, "truncated: its tensors end at byte 10000000"),
    ],
)
def test_a_corrupt_entry_is_refused(model: Path, change: dict[str, Any], message: str) -> None:
    edit_header(model / "model.safetensors", lambda header: header["lm_head.weight"].update(change))
    with pytest.raises(ModelError, match=message):
        open_checkpoint(model)


def test_no_damage_to_the_header_gives_another_error(model: Path) -> None:
    file, rng = model / "model.safetensors", random.Random(0)
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.randrange(header)] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            with open_checkpoint(model) as checkpoint:
                for name in checkpoint.tensors:
                    checkpoint.read(name, 0, 1)
        except ModelError:
            pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("[]", "holds a list"),
        ("{", "not valid JSON"),
        ("\x00", "not valid JSON"),
    ],
)
def test_a_directory_without_a_proper_config_is_refused(
    model: Path, content: str | None, message: str
) -> None:
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(model)


def test_other_weight_formats_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds pytorch_model.bin but no safetensors"):
        open_checkpoint(model)
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="holds no safetensors file"):
        open_checkpoint(model)
    save_file({"a": torch.ones(1, 1)}, model / "a.safetensors")
    save_file({"b": torch.ones(1, 1)}, model / "b.safetensors")
    with pytest.raises(ModelError, match=r"2 safetensors files but no .*: a.safetensors, b.safetensors"):
        open_checkpoint(model)


def test_a_tokenizer_is_copied_so_that_it_loads(model: Path, tmp_path: Path) -> None:
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        ["low lower lowest new newer newest"] * 3, vocab_size=280, show_progress=False
    )
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with open_checkpoint(model) as checkpoint:
        checkpoint.export_tokenizer(tmp_path / "copy")
    loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "copy"))
    text = "the newest is lower"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.apply_chat_template([{"role": "user", "content": text}], tokenize=False) == text


def test_a_model_without_tokenizer_exports_nothing(model: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    with open_checkpoint(model) as checkpoint:
        checkpoint.export_tokenizer(tmp_path / "copy")
        assert not list((tmp_path / "copy").iterdir())
        (model / "tokenizer.model").write_bytes(b"x")
        with pytest.raises(ModelError, match=r"only as tokenizer.model, no tokenizer.json"):
            checkpoint.export_tokenizer(tmp_path / "copy")


def test_tiny_models_are_reproducible() -> None:
    first, second = (tiny_weights(tiny_config("qwen3"), seed=3) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
