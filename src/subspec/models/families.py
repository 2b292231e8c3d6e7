"""The families of models as data: what sets each apart, and which config fields may be there.

Read by :mod:`subspec.models.config`. A family is a row of :data:`FAMILIES`, not a class; the next is a few
lines. A field that is neither understood nor listed as harmless is an error, because a quirk that is silently
dropped gives wrong text. Knows nothing of tensors, torch or transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from subspec.errors import ModelError


@dataclass(frozen=True)
class Family:
    """How one architecture departs from the common decoder; a string names the config field that decides."""

    architecture: str
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    window_limits_context: bool = False
    """Whether ``sliding_window`` is in force wherever set; within its length it equals full attention."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a config file leaves out, in the family's own defaults."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields that are understood only at these values."""
    harmless: frozenset[str] = frozenset()


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NO_WINDOW = {"use_sliding_window": (False, None)}
_WINDOW_SETTINGS = frozenset({"sliding_window", "max_window_layers"})

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        defaults={
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        harmless=frozenset({"pretraining_tp", "is_llama_config"}),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        window_limits_context=True,
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        fixed={"attention_bias": (False, None), "mlp_bias": (False, None)},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
        fixed=_NO_WINDOW,
        harmless=_WINDOW_SETTINGS,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
        },
        fixed=_NO_WINDOW,
        harmless=_WINDOW_SETTINGS,
    ),
}

_UNDERSTOOD = _words(
    "architectures bos_token_id eos_token_id head_dim hidden_size intermediate_size layer_types "
    "max_position_embeddings model_type num_attention_heads num_hidden_layers num_key_value_heads "
    "rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings vocab_size"
)
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
# Training settings, bookkeeping, and defaults of generation: none changes what a forward pass computes.
_HARMLESS = _words(
    "_attn_implementation _attn_implementation_autoset _from_model_config _model_name_or_path "
    "_name_or_path attention_dropout auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward "
    "decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label "
    "initializer_range is_decoder label2id length_penalty max_length min_length no_repeat_ngram_size "
    "num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_scores "
    "pad_token_id prefix problem_type remove_invalid_values repetition_penalty return_dict "
    "return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss "
    "tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config "
    "transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache"
)


def find_family(config: Mapping[str, Any]) -> tuple[str, Family]:
    """The family that the config's ``architectures`` and ``model_type`` agree on."""
    architectures = config.get("architectures") or []
    model_type = config.get("model_type")
    by_architecture = {family.architecture: name for name, family in FAMILIES.items()}
    supported = ", ".join(f"{family.architecture} ({name})" for name, family in FAMILIES.items())
    if len(architectures) > 1 or (architectures and architectures[0] not in by_architecture):
        raise ModelError(
            f"architecture {', '.join(map(str, architectures))} is not supported; supported: {supported}"
        )
    name = by_architecture[architectures[0]] if architectures else model_type
    if name is None:
        raise ModelError(f"the config names neither architectures nor model_type; supported: {supported}")
    if name not in FAMILIES or model_type not in (None, name):
        raise ModelError(
            f"model_type {model_type!r} is not supported as {architectures or name}; supported: {supported}"
        )
    return name, FAMILIES[name]


def check_fields(config: Mapping[str, Any], name: str, family: Family) -> None:
    """Refuse every field that is not known to be read, harmless, or at a value where it changes nothing."""
    if config.get("quantization_config") is not None:
        quantization = config["quantization_config"]
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        )
        raise ModelError(
            f"the checkpoint is already quantized (quantization_config, method {method}); its weights are "
            "not exact bf16, fp16 or fp32: use the original checkpoint, or a GGUF file"
        )
    fixed = {**_FIXED, **family.fixed}
    switches = {
        flag for flag in (family.qkv_bias, family.output_bias, family.mlp_bias) if isinstance(flag, str)
    }
    known = _UNDERSTOOD | _HARMLESS | family.harmless | switches | set(family.defaults)
    for key, value in config.items():
        if key in fixed:
            if value not in fixed[key]:
                allowed = " or ".join(repr(choice) for choice in fixed[key])
                raise ModelError(
                    f"config field {key} = {value!r} is not supported for {name}; supported: {allowed}"
                )
        elif key not in known:
            raise ModelError(
                f"config field {key} = {value!r} is not understood for {name}, so the model might compute "
                "something else; if the field is harmless, remove it from config.json"
            )
