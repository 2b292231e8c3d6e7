"""Builders of tiny random models: the same weights as a Hugging Face directory and as a GGUF file.

Biases and norm gains are random too, and logits have a standard deviation above 1, so that a decoder that
drops any term computes something visibly different; greedy texts wander instead of repeating one token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from subspec.models.config import ModelConfig

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")

_COMMON: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_FAMILY: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama3": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_parameters": _LLAMA3_ROPE},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 24,
        "attention_bias": False,
    },
}
_GGUF_ARCH = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """A Hugging Face config of one of :data:`FAMILIES`; ``changes`` replace or add fields."""
    return {**_COMMON, **_FAMILY[family], **changes}


def tiny_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random fp32 weights for a config."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _random(name, shape, generator)
        for name, shape in ModelConfig.from_dict(config).tensors().items()
    }


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if "norm" in name:
        return 0.5 + torch.rand(shape, generator=generator)
    values = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.3 * values
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return 0.3 * values
    return values * (2.0 / math.sqrt(shape[1]))


def write_tiny(
    directory: Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shards: int = 1,
    **changes: Any,
) -> Path:
    """Write a Hugging Face directory (no tokenizer) and return it."""
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, **changes)
    (directory / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    weights = {name: weight.to(dtype) for name, weight in tiny_weights(config, seed).items()}
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
        return directory
    names = list(weights)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = {name: weights[name] for name in names[shard::shards]}
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def add_letters(directory: Path) -> None:
    """Give a Hugging Face directory a tokenizer: every letter is a token, ids are below 200."""
    tokenizer = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(200)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))


def write_tiny_gguf(path: Path, family: str, kind: str = "F32", seed: int = 0, **changes: Any) -> Path:
    """Write the same weights as :func:`write_tiny` as a GGUF file, as llama.cpp's converter lays them out.

    ``kind`` is the matrices' type: F32, F16, BF16, or a quantized one that ``gguf`` can make (Q8_0, Q4_0).
    A matrix whose rows are no whole blocks stays F16 then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, **changes)
    model = ModelConfig.from_dict(config)
    writer = gguf.GGUFWriter(path, _GGUF_ARCH[model.family])
    _write_header(writer, model)
    if model.rope.kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_divisors(model))
    for name, weight in tiny_weights(config, seed).items():
        data = weight.numpy()
        if _GGUF_ARCH[model.family] == "llama" and ".q_proj" in name:
            data = _pair_halves(data, model.heads)
        if _GGUF_ARCH[model.family] == "llama" and ".k_proj" in name:
            data = _pair_halves(data, model.kv_heads)
        wanted = _stored_kind(kind, data.shape)
        writer.add_tensor(_gguf_name(name), quantize(np.ascontiguousarray(data), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_header(writer: gguf.GGUFWriter, model: ModelConfig) -> None:
    writer.add_name("tiny")
    writer.add_block_count(model.layers)
    writer.add_context_length(model.max_position)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope.theta)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_vocab_size(model.vocab_size)
    if model.rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(model.rope.factor)
    if model.bos_token_id is not None:
        writer.add_bos_token_id(model.bos_token_id)
    for token in model.eos_token_ids[:1]:
        writer.add_eos_token_id(token)


def _stored_kind(kind: str, shape: tuple[int, ...]) -> gguf.GGMLQuantizationType:
    wanted = gguf.GGMLQuantizationType[kind]
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType.F16 if shape[1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def _gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    base, kind = name.rsplit(".", 1)
    if base in top:
        return f"{top[base]}.{kind}"
    _, _, layer, part = base.split(".", 3)
    return f"blk.{layer}.{_GGUF_LAYER[part]}.{kind}"


def _pair_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Each head's two halves, interleaved: rows 0, D/2, 1, D/2 + 1, …"""
    head = rows.shape[0] // heads
    order = [
        h * head + half * head // 2 + i for h in range(heads) for i in range(head // 2) for half in (0, 1)
    ]
    return rows[order]


def _rope_divisors(model: ModelConfig) -> np.ndarray:
    """Llama 3's scaling as divisors: 1 for short waves, the factor for long ones, mixed between."""
    rope, divisors = model.rope, []
    for index in range(model.head_dim // 2):
        turns = rope.original_max_position * rope.theta ** (-2 * index / model.head_dim) / (2 * math.pi)
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = min(1.0, max(0.0, kept))
        divisors.append(1 / (kept + (1 - kept) / rope.factor))
    return np.array(divisors, dtype=np.float32)
