"""GGUF files: the same tensors and numbers as the safetensors they were made from."""

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import dequantize
from tiny import FAMILIES, write_tiny, write_tiny_gguf

from subspec.checkpoint import open_checkpoint
from subspec.models.config import ModelConfig


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model_from_both_kinds_of_file(tmp_path: Path, family: str, tied: bool) -> None:
    directory = write_tiny(tmp_path / "hf", family, tie_word_embeddings=tied)
    file = write_tiny_gguf(tmp_path / "tiny.gguf", family, tie_word_embeddings=tied)
    with open_checkpoint(directory) as plain, open_checkpoint(file) as packed:
        assert packed.tensors == plain.tensors
        assert packed.dtype == torch.float32
        for name in plain.tensors:
            assert torch.equal(packed.read(name), plain.read(name)), name
        expected, found = (ModelConfig.from_dict(checkpoint.config) for checkpoint in (plain, packed))
    found.check_tensors(plain.tensors)
    differing = {key for key in vars(found) if getattr(found, key) != getattr(expected, key)}
    # The header holds fp32, calls Mistral a Llama, and Llama 3's scaling a list of divisors.
    assert differing <= {"rms_norm_eps", "family", "rope"}
    assert found.rms_norm_eps == np.float32(expected.rms_norm_eps)
    assert (found.rope != expected.rope) == (family == "llama3")


def test_llama3_scaling_comes_as_divisors(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "hf", "llama3")
    with open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", "llama3")) as checkpoint:
        rope = ModelConfig.from_dict(checkpoint.config).rope
    config = transformers.AutoConfig.from_pretrained(directory)
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    theirs, _ = init(config, torch.device("cpu"))
    assert rope.frequency_divisors is not None
    plain = rope.theta ** (-torch.arange(8) / 8)
    torch.testing.assert_close(plain / torch.tensor(rope.frequency_divisors), theirs)


def test_linear_rope_and_a_window(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0}
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "mistral", rope_parameters=rope, sliding_window=100)
    with open_checkpoint(file) as checkpoint:
        model = ModelConfig.from_dict(checkpoint.config)
    assert (model.rope.kind, model.rope.theta, model.rope.factor) == ("linear", 50000.0, 2.0)
    assert model.max_position == 100


def test_llamas_rows_are_those_that_transformers_loads(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "llama3")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    weights = theirs.state_dict()
    with open_checkpoint(file) as checkpoint:
        assert checkpoint.tensors.keys() == weights.keys()
        for name, weight in weights.items():
            assert torch.equal(checkpoint.read(name), weight), name


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_matrices_are_what_the_library_dequantizes(tmp_path: Path, kind: str) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "qwen2", kind, intermediate_size=128)
    own = {"F16": torch.float16}.get(kind, torch.bfloat16)
    reader = gguf.GGUFReader(file)
    theirs = {t.name: torch.from_numpy(dequantize(np.array(t.data), t.tensor_type)) for t in reader.tensors}
    with open_checkpoint(file) as rounded, open_checkpoint(file, torch.float32) as full:
        assert rounded.dtype == own
        for ours, name in [
            ("lm_head.weight", "output.weight"),
            ("model.layers.2.self_attn.k_proj.weight", "blk.2.attn_k.weight"),
            ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
            ("model.layers.1.self_attn.q_proj.bias", "blk.1.attn_q.bias"),
        ]:
            assert torch.equal(full.read(ours), theirs[name])
            assert torch.equal(rounded.read(ours), theirs[name].to(own))


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("chunk", [1, 200, 1000, 5000])
def test_rows_equal_slices(tmp_path: Path, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(write_tiny_gguf(tmp_path / "tiny.gguf", "llama", kind)) as checkpoint:
        names = [
            f"model.layers.1.self_attn.{part}" for part in ("q_proj.weight", "k_proj.weight", "k_proj.bias")
        ]
        whole = {name: checkpoint.read(name) for name in ["model.embed_tokens.weight", *names]}
        monkeypatch.setattr(type(checkpoint), "_chunk_elements", chunk)
        for name, weight in whole.items():
            for start, stop in [(0, 0), (0, 1), (3, 20), (7, 9), (8, 32), (31, 32), (0, len(weight))]:
                assert torch.equal(checkpoint.read(name, start, stop), weight[start:stop]), (
                    name,
                    start,
                    stop,
                )


def test_identity_changes_with_time_size_and_header(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", "qwen3")
    seen = []

    def identity() -> dict[str, Any]:
        with open_checkpoint(file) as checkpoint:
            found = checkpoint.identity()
        assert found == json.loads(json.dumps(found))
        return found

    seen.append(identity())
    assert identity() == seen[0]
    time = file.stat().st_mtime_ns
    os.utime(file, ns=(time, time + 1))
    seen.append(identity())
    with file.open("ab") as stream:
        stream.write(b"x")
    os.utime(file, ns=(time, time))
    seen.append(identity())
    content = file.read_bytes().replace(b"tiny", b"TINY", 1)
    file.write_bytes(content)
    os.utime(file, ns=(time, time))
    seen.append(identity())
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
