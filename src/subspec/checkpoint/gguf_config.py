"""What a GGUF header says about the model, in the words of a Hugging Face config; and the tensors' names.

The other half of llama.cpp's conversion, read backwards. Knows nothing of where bytes lie.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from subspec.errors import ModelError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_DIVISORS = "rope_freqs.weight"

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# Metadata under the architecture's prefix that is read here, or that changes nothing.
_UNDERSTOOD = frozenset(
    {"block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"}
    | {"attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"}
    | {
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "rope.freq_base",
        "rope.dimension_count",
    }
    | {"rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"}
)
_HARMLESS = frozenset(
    {
        "tensor_data_layout",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "source.architecture",
    }
)
_FIXED: Mapping[str, Any] = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name that is not understood stays as it is."""
    if name in _TOP:
        return _TOP[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        return name
    return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def hf_config(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A Hugging Face config from metadata and the tensors' shapes by GGUF name.

    Raises:
        ModelError: the architecture, or a field of it, is not understood.
    """
    arch = _architecture(metadata, tensors)
    own = {
        key.removeprefix(f"{arch}."): value for key, value in metadata.items() if key.startswith(f"{arch}.")
    }
    _check_fields(arch, own)
    heads = _per_layer_constant(own, "attention.head_count")
    hidden = _whole(own, "embedding_length")
    head_dim = _whole(own, "attention.key_length", hidden // heads)
    _check_head(own, head_dim)
    context = _whole(own, "context_length")
    config = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": tensors["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": _per_layer_constant(own, "feed_forward_length"),
        "num_hidden_layers": _whole(own, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _per_layer_constant(own, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _need(own, "attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": min(context, _whole(own, "attention.sliding_window", context)),
        "rope_parameters": _rope(own),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(metadata),
    }
    return config | _biases(arch, tensors)


def _architecture(metadata: Mapping[str, Any], tensors: Collection[str]) -> str:
    """The architecture, if it is supported and the file is a whole model."""
    arch = str(metadata.get("general.architecture"))
    if arch not in ARCHITECTURES:
        raise ModelError(
            f"GGUF architecture {arch!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise ModelError(
            f"this is one of the {metadata['split.count']} parts of a split GGUF file: join them with "
            "llama.cpp's `llama-gguf-split --merge`"
        )
    if "token_embd.weight" not in tensors:
        raise ModelError("the GGUF file lacks the tensor token_embd.weight: it is no complete model")
    return arch


def _check_fields(arch: str, own: Mapping[str, Any]) -> None:
    """Refuse metadata of the architecture that is neither understood nor harmless."""
    for key, value in own.items():
        if key in _FIXED:
            if value != _FIXED[key]:
                raise ModelError(
                    f"GGUF field {arch}.{key} = {value} is not supported; supported: {_FIXED[key]}"
                )
        elif key not in _UNDERSTOOD and key not in _HARMLESS:
            raise ModelError(
                f"GGUF field {arch}.{key} = {value} is not understood: the model might compute something else"
            )


def _check_head(own: Mapping[str, Any], head_dim: int) -> None:
    """Keys, values and rotary positions must have one width."""
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise ModelError(f"GGUF field {key} = {own[key]} is not supported beside heads of {head_dim}")


def _rope(own: Mapping[str, Any]) -> dict[str, Any]:
    kind = own.get("rope.scaling.type", "none")
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))
    rope = {"rope_theta": own.get("rope.freq_base", 10000.0), "rope_type": "default"}
    if kind not in ("none", "linear"):
        raise ModelError(
            f"GGUF rope scaling {kind!r} is not supported; supported: none, linear, rope_freqs.weight"
        )
    if factor != 1.0 and (kind == "linear" or "rope.scale_linear" in own):
        rope |= {"rope_type": "linear", "factor": factor}
    return rope


def _biases(arch: str, tensors: Collection[str]) -> dict[str, bool]:
    """Llama's and Qwen3's optional biases show in the tensors alone."""
    if arch == "qwen2":
        return {}
    attention = "blk.0.attn_q.bias" in tensors
    return {"attention_bias": attention} | (
        {"mlp_bias": "blk.0.ffn_gate.bias" in tensors} if arch == "llama" else {}
    )


def _end_tokens(metadata: Mapping[str, Any]) -> list[int] | None:
    """End of text, of turn and of message: each ends an answer."""
    ids = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    return list(dict.fromkeys(token for token in ids if token is not None)) or None


def _per_layer_constant(own: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A number that may be written once for each layer, but must be the same in all."""
    value = own.get(key)
    if isinstance(value, list) and len(set(value)) == 1:
        return _whole({key: value[0]}, key)
    return _whole(own, key, default)


def _whole(own: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of at least one."""
    value = default if own.get(key) is None else own[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(
            f"GGUF field {key} = {value} must be a whole number of at least 1, the same in every layer"
        )
    return value


def _need(own: Mapping[str, Any], key: str) -> Any:
    if own.get(key) is None:
        raise ModelError(f"the GGUF file lacks the field {key}")
    return own[key]
