"""Configs: understood completely, or refused by name."""

import json
import subprocess
import sys
from typing import Any

import pytest
import transformers
from tiny import FAMILIES, tiny_config

from subspec.errors import ModelError
from subspec.models.config import ModelConfig, RopeConfig

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_a_published_config_is_understood() -> None:
    model = ModelConfig.from_dict(SMOLLM2)
    assert (model.family, model.layers, model.heads, model.kv_heads, model.head_dim) == (
        "llama",
        30,
        9,
        3,
        64,
    )
    assert model.rope == RopeConfig(theta=100000.0)
    assert model.tied_embeddings
    assert not model.qkv_bias
    assert model.eos_token_ids == (2,)
    assert model.parameters == 134_515_008


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_those_of_transformers(family: str, tied: bool) -> None:
    config = tiny_config(family, tie_word_embeddings=tied)
    reference = transformers.AutoConfig.for_model(**config)
    model: Any = transformers.AutoModelForCausalLM.from_config(reference)  # type: ignore[no-untyped-call]
    theirs = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    ModelConfig.from_dict(config).check_tensors(theirs)
    if tied:
        theirs.pop("lm_head.weight")
    assert ModelConfig.from_dict(config).tensors() == theirs


@pytest.mark.parametrize(
    "config_class",
    [
        transformers.LlamaConfig,
        transformers.MistralConfig,
        transformers.Qwen2Config,
        transformers.Qwen3Config,
    ],
)
def test_what_transformers_writes_is_understood(config_class: Any) -> None:
    written = json.loads(config_class(num_hidden_layers=2).to_json_string())
    model = ModelConfig.from_dict(written)
    assert model.layers == 2
    sparse = json.loads(config_class(num_hidden_layers=2).to_json_string(use_diff=True))
    sizes = {"vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"}
    sparse |= {key: written[key] for key in sizes}
    assert ModelConfig.from_dict(sparse) == model


def test_both_styles_of_rope_mean_the_same() -> None:
    new = tiny_config("llama3")
    rope = dict(new["rope_parameters"])
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)
    assert ModelConfig.from_dict(new).rope == RopeConfig(10000.0, "llama3", 4.0, 1.0, 4.0, 128)


def test_linear_rope_in_the_oldest_style() -> None:
    config = tiny_config("llama", rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0})
    assert ModelConfig.from_dict(config).rope == RopeConfig(10000.0, "linear", 2.0)


def test_divisors_from_a_gguf_file_are_kept() -> None:
    divisors = [1.0] * 4 + [8.0] * 4
    config = tiny_config("llama", rope_parameters={"rope_theta": 5e5, "frequency_divisors": divisors})
    assert ModelConfig.from_dict(config).rope == RopeConfig(5e5, frequency_divisors=tuple(divisors))


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {"head_dim": None}, {"head_dim": 16}),
        ("llama", {"num_key_value_heads": None}, {"kv_heads": 4}),
        ("llama", {}, {"qkv_bias": True, "output_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 100}, {"max_position": 100}),
        ("mistral", {"sliding_window": 4096}, {"max_position": 512}),
        ("mistral", {"sliding_window": 64, "layer_types": ["sliding_attention"] * 3}, {"max_position": 64}),
        ("qwen2", {"sliding_window": 32, "max_window_layers": 2}, {"max_position": 512, "qkv_bias": True}),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, {"output_bias": False}),
        ("qwen3", {"attention_bias": True}, {"qk_norm": True, "qkv_bias": True, "output_bias": True}),
        ("qwen3", {"eos_token_id": [7, 5, 7]}, {"eos_token_ids": (7, 5)}),
        ("qwen3", {"eos_token_id": None, "bos_token_id": None}, {"eos_token_ids": (), "bos_token_id": None}),
        ("llama", {"architectures": None}, {"family": "llama"}),
    ],
)
def test_fields_are_read(family: str, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    model = ModelConfig.from_dict(tiny_config(family, **changes))
    assert {key: getattr(model, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("family", "missing", "expected"),
    [
        ("qwen3", "head_dim", {"head_dim": 128}),
        ("mistral", "sliding_window", {"max_position": 512}),
        ("llama", "max_position_embeddings", {"max_position": 2048}),
        ("llama", "eos_token_id", {"eos_token_ids": (2,)}),
    ],
)
def test_a_field_left_out_has_the_familys_default(
    family: str, missing: str, expected: dict[str, Any]
) -> None:
    config = tiny_config(family)
    del config[missing]
    model = ModelConfig.from_dict(config)
    assert {key: getattr(model, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            {"architectures": ["GemmaForCausalLM"]},
            "GemmaForCausalLM is not supported; supported: Llama",
        ),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("llama", {"model_type": "mistral"}, "'mistral' is not supported as"),
        ("llama", {"architectures": None, "model_type": "gpt2"}, "'gpt2' is not supported"),
        ("llama", {"architectures": None, "model_type": None}, "neither architectures nor model_type"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"logit_softcapping": 30.0}, "logit_softcapping = 30.0 is not understood for llama"),
        ("mistral", {"pretraining_tp": 2}, "pretraining_tp"),
        ("mistral", {"attention_bias": True}, "attention_bias = True"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen2", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "sliding_attention"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "lists 2 layers, num_hidden_layers is 3"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "already quantized .*awq"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ("llama", {"rope_parameters": {"mscale": 1.0}}, "rope field mscale"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "lacks factor"),
        ("llama", {"rope_parameters": LLAMA3}, "lacks original_max_position_embeddings"),
        (
            "llama",
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
            "low_freq_factor 4.0 must be below",
        ),
        ("llama", {"rope_parameters": {"frequency_divisors": [1.0] * 3}}, "3 rope frequency divisors"),
        ("llama", {"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
        ("llama", {"hidden_size": None}, "lacks hidden_size"),
        ("llama", {"hidden_size": "64"}, "hidden_size = '64'"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0"),
        ("llama", {"num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads 3"),
        ("llama", {"head_dim": 15}, "head_dim 15 is odd"),
        ("llama", {"eos_token_id": 320}, "320 is outside the vocabulary of 320"),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id = '</s>'"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder"),
    ],
)
def test_a_quirk_is_refused_by_name(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_dict(tiny_config(family, **changes))


def test_missing_surplus_and_misshapen_tensors_are_named() -> None:
    model = ModelConfig.from_dict(tiny_config("qwen2"))
    found = model.tensors()
    model.check_tensors(found)
    del found["model.norm.weight"]
    found["model.layers.0.mlp.up_proj.weight"] = (112, 63)
    found |= {f"model.layers.0.extra.{index}": (index,) for index in range(6)}
    with pytest.raises(ModelError) as error:
        model.check_tensors(found)
    message = str(error.value)
    assert "1 missing (model.norm.weight (64,))" in message
    assert "6 surplus (model.layers.0.extra.0 (0,), " in message
    assert "and 2 more" in message
    assert "model.layers.0.mlp.up_proj.weight is (112, 63), must be (112, 64)" in message


def test_rotary_buffers_and_a_head_beside_tied_embeddings_may_be_there() -> None:
    model = ModelConfig.from_dict(tiny_config("llama", tie_word_embeddings=True))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,), "lm_head.weight": (320, 64)}
    model.check_tensors(model.tensors() | extra)
    untied = ModelConfig.from_dict(tiny_config("llama"))
    with pytest.raises(ModelError, match=r"1 missing \(lm_head.weight"):
        untied.check_tensors(model.tensors())


def test_reading_a_config_needs_no_torch() -> None:
    code = (
        "import sys, subspec.models.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
