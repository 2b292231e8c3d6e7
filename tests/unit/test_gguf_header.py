"""GGUF headers: understood completely, or refused by name; damage of any kind is an error that says so."""

import json
import os
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import transformers
from tiny import write_tiny_gguf

from subspec.checkpoint import open_checkpoint
from subspec.checkpoint.gguf_header import read_header
from subspec.errors import ModelError
from subspec.models.config import ModelConfig


def write_header(
    path: Path, fields: dict[str, Any], tensors: tuple[str, ...] = ("token_embd.weight",)
) -> Path:
    """A GGUF file of a small Llama's header with some fields changed (None: left out)."""
    base = {
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    arch = fields.pop("general.architecture", "llama")
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (base | fields).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_string(key, value)
    for name in tensors:
        writer.add_tensor(name, np.zeros((8, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"general.architecture": "gemma"},
            "architecture 'gemma' is not supported; supported: llama, qwen2, qwen3",
        ),
        ({"split.count": 3}, "one of the 3 parts of a split GGUF"),
        ({"llama.logit_scale": 2.0}, r"llama.logit_scale = 2.0 is not understood"),
        ({"llama.expert_count": 8}, r"llama.expert_count = 8 is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count = 8 is not supported beside heads of 16"),
        ({"llama.attention.value_length": 8}, "attention.value_length = 8"),
        ({"llama.attention.head_count": None}, "attention.head_count = None must be a whole number"),
        ({"llama.attention.head_count": [2, 4]}, r"attention.head_count = \[2, 4\]"),
        ({"llama.attention.head_count": 0}, "attention.head_count = 0"),
        ({"llama.embedding_length": "wide"}, "embedding_length = wide"),
        (
            {"llama.attention.layer_norm_rms_epsilon": None},
            "lacks the field attention.layer_norm_rms_epsilon",
        ),
    ],
)
def test_a_header_that_is_not_understood_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    file = write_header(tmp_path / "odd.gguf", dict(fields))
    with pytest.raises(ModelError, match=message) as error:
        open_checkpoint(file)
    assert "odd.gguf" in str(error.value)


def test_a_number_written_once_a_layer_is_read(tmp_path: Path) -> None:
    file = write_header(tmp_path / "a.gguf", {"llama.attention.head_count_kv": [2], "llama.expert_count": 0})
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.config["num_key_value_heads"] == 2
        assert checkpoint.config["head_dim"] == 16


def test_every_end_of_answer_token_is_taken(tmp_path: Path) -> None:
    ids = {f"tokenizer.ggml.{kind}_token_id": token for kind, token in [("eos", 3), ("eot", 4), ("eom", 3)]}
    with open_checkpoint(write_header(tmp_path / "a.gguf", ids)) as checkpoint:
        assert checkpoint.config["eos_token_id"] == [3, 4]


def test_tensors_that_are_not_understood_keep_their_names(tmp_path: Path) -> None:
    names = ("token_embd.weight", "blk.0.ffn_gate_exps.weight", "mystery")
    with open_checkpoint(write_header(tmp_path / "a.gguf", {}, names)) as checkpoint:
        assert set(checkpoint.tensors) == {"model.embed_tokens.weight", *names[1:]}
        with pytest.raises(ModelError, match=r"surplus \(blk.0.ffn_gate_exps.weight"):
            ModelConfig.from_dict(checkpoint.config).check_tensors(checkpoint.tensors)
    with pytest.raises(ModelError, match=r"lacks the tensor token_embd.weight"):
        open_checkpoint(write_header(tmp_path / "b.gguf", {}, ("mystery",)))


def replace_at(file: Path, offset: int, value: bytes) -> None:
    content = bytearray(file.read_bytes())
    content[offset : offset + len(value)] = value
    file.write_bytes(content)


def kind_offset(file: Path, name: str) -> int:
    """Where a matrix's type code lies: after its name, the number of dimensions and two sizes."""
    return file.read_bytes().index(name.encode()) + len(name) + 4 + 16


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (999, "token_embd.weight has type 999"),
        (26, "type I32, which cannot be dequantized"),
        (28, "type F64"),
    ],
)
def test_a_type_that_cannot_be_read_is_refused(tmp_path: Path, kind: int, message: str) -> None:
    file = write_header(tmp_path / "a.gguf", {})
    replace_at(file, kind_offset(file, "token_embd.weight"), struct.pack("<I", kind))
    with file.open("ab") as stream:
        stream.write(bytes(4096))
    with pytest.raises(ModelError, match=message):
        open_checkpoint(file)


def test_other_files_and_versions_are_refused(tmp_path: Path) -> None:
    file = write_header(tmp_path / "a.gguf", {})
    good = file.read_bytes()
    for version in (1, 4, 3 << 24):
        replace_at(file, 4, struct.pack("<I", version))
        with pytest.raises(ModelError, match=f"version {version}; supported: 2 and 3"):
            open_checkpoint(file)
    file.write_bytes(b"GGML" + good[4:])
    with pytest.raises(ModelError, match="no GGUF file"):
        open_checkpoint(file)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    content, header = file.read_bytes(), read_header(file).size
    for size in [*range(0, header, 101), header - 1, header, len(content) // 2, len(content) - 64]:
        file.write_bytes(content[:size])
        with pytest.raises(ModelError, match="truncated"):
            open_checkpoint(file)


def test_a_file_truncated_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama")
    with open_checkpoint(file) as checkpoint:
        os.truncate(file, read_header(file).size + 100)
        with pytest.raises(ModelError, match="is truncated"):
            checkpoint.read("lm_head.weight")


def test_no_damage_to_the_header_gives_another_error(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama", "Q8_0")
    content, header, rng = file.read_bytes(), read_header(file).size, random.Random(0)
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.randrange(header)] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            with open_checkpoint(file) as checkpoint:
                ModelConfig.from_dict(checkpoint.config).check_tensors(checkpoint.tensors)
        except ModelError:
            pass


def test_a_file_without_tokenizer_exports_nothing(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    with open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", "qwen2")) as checkpoint:
        checkpoint.export_tokenizer(tmp_path / "copy")
    assert not list((tmp_path / "copy").iterdir())


def test_a_tokenizer_is_converted_so_that_it_loads(tmp_path: Path) -> None:
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        ["low lower lowest new newer newest"] * 3, vocab_size=280, show_progress=False
    )
    vocabulary, model = tokenizer.get_vocab(), json.loads(tokenizer.to_str())["model"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": sorted(vocabulary, key=lambda token: vocabulary[token]),
        "tokenizer.ggml.token_type": [1] * len(vocabulary),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    with open_checkpoint(write_header(tmp_path / "a.gguf", fields)) as checkpoint:
        checkpoint.export_tokenizer(tmp_path / "copy")
    loaded = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "copy"))
    text = "the newest is lower"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.apply_chat_template([{"role": "user", "content": text}], tokenize=False) == text


def test_a_tokenizer_that_cannot_be_converted_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nValueError: a riddle")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    file = write_header(tmp_path / "a.gguf", {"tokenizer.ggml.model": "riddle"})
    with (
        open_checkpoint(file) as checkpoint,
        pytest.raises(ModelError, match="cannot convert the tokenizer of .*: ValueError: a riddle"),
    ):
        checkpoint.export_tokenizer(tmp_path)


def test_long_arrays_are_passed_over(tmp_path: Path) -> None:
    words = [f"w{index}" for index in range(5000)]
    fields = {
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": [0.5] * 5000,
        "general.tags": ["a", "b"],
    }
    header = read_header(write_header(tmp_path / "a.gguf", fields))
    assert header.metadata["tokenizer.ggml.tokens"] is None
    assert header.metadata["tokenizer.ggml.scores"] is None
    assert header.metadata["general.tags"] == ["a", "b"]
    assert header.metadata["llama.block_count"] == 1
