"""What a model is, in plain numbers, from a Hugging Face ``config.json`` or a GGUF header in the same words.

Says which tensors, of which shapes, a checkpoint must have; ``prepare`` joins the two, and the decoder
is built from it. Knows nothing of files, tensors' contents, torch or transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, Literal, get_args

from subspec.errors import ModelError
from subspec.models.families import Family, check_fields, find_family

RopeKind = Literal["default", "linear", "llama3"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: ``theta ** (-2i / D)``, then scaled as ``kind`` says.

    ``frequency_divisors`` are D/2 numbers that divide the unscaled frequencies: how GGUF states llama3.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    frequency_divisors: tuple[float, ...] | None = None


_ROPE_FIELDS = frozenset(
    {"rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor"}
    | {"original_max_position_embeddings", "partial_rotary_factor", "frequency_divisors"}
)
_NAMED_AT_MOST = 4


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that fix a decoder: sizes, biases, norms, rotary positions, tokens that end a text."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    max_position: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Understand a ``config.json`` completely, in the style of transformers 4 or 5.

        Raises:
            ModelError: the architecture, a value or a field is not understood; the message names it.
        """
        name, family = find_family(config)
        check_fields(config, name, family)
        values = {**family.defaults, **config}
        hidden, heads = (
            _count(values, "hidden_size"),
            _count(values, "num_attention_heads"),
        )
        head_dim = _count(values, "head_dim", hidden // heads)
        max_position = _count(values, "max_position_embeddings")
        if family.window_limits_context and values.get("sliding_window") is not None:
            max_position = min(max_position, _count(values, "sliding_window"))
        model = cls(
            family=name,
            vocab_size=_count(values, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_count(values, "intermediate_size"),
            layers=_count(values, "num_hidden_layers"),
            heads=heads,
            kv_heads=_count(values, "num_key_value_heads", heads),
            head_dim=head_dim,
            rms_norm_eps=_number(values, "rms_norm_eps", 1e-6),
            rope=_rope(values, head_dim),
            qkv_bias=_switch(values, family.qkv_bias),
            output_bias=_switch(values, family.output_bias),
            mlp_bias=_switch(values, family.mlp_bias),
            qk_norm=family.qk_norm,
            tied_embeddings=_switch(values, "tie_word_embeddings"),
            max_position=max_position,
            eos_token_ids=_token_ids(values, "eos_token_id"),
            bos_token_id=next(iter(_token_ids(values, "bos_token_id")), None),
        )
        _check_sizes(model)
        _check_layer_types(config, model.layers, family)
        return model

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of one layer's tensors, without their ``model.layers.N.`` in front."""
        C, F, D = self.hidden_size, self.intermediate_size, self.head_dim
        q_rows, kv_rows = self.heads * D, self.kv_heads * D
        linears = {
            "self_attn.q_proj": (q_rows, C, self.qkv_bias),
            "self_attn.k_proj": (kv_rows, C, self.qkv_bias),
            "self_attn.v_proj": (kv_rows, C, self.qkv_bias),
            "self_attn.o_proj": (C, q_rows, self.output_bias),
            "mlp.gate_proj": (F, C, self.mlp_bias),
            "mlp.up_proj": (F, C, self.mlp_bias),
            "mlp.down_proj": (C, F, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (C,),
            "post_attention_layernorm.weight": (C,),
        }
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (D,), "self_attn.k_norm.weight": (D,)}
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)
        return shapes

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the model must have, in Hugging Face's names, with its shape."""
        table = (self.vocab_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
        layer = self.layer_tensors()
        for index in range(self.layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = table
        return shapes

    @property
    def parameters(self) -> int:
        """How many weights the model has; tied embeddings count once."""
        return sum(prod(shape) for shape in self.tensors().values())

    def check_tensors(self, found: Mapping[str, tuple[int, ...]]) -> None:
        """Check that a checkpoint holds exactly this model's tensors.

        Rotary buffers, and an output head beside tied embeddings, may be there: old files carry them unused.

        Raises:
            ModelError: tensors are missing, surplus or of another shape; the message counts and names them.
        """
        wanted = self.tensors()
        tolerated = {name for name in found if name.endswith(".rotary_emb.inv_freq")}
        if self.tied_embeddings:
            tolerated.add("lm_head.weight")
        missing = [f"{name} {wanted[name]}" for name in wanted if name not in found]
        surplus = [
            f"{name} {tuple(found[name])}" for name in found if name not in wanted and name not in tolerated
        ]
        wrong = [
            f"{name} is {tuple(found[name])}, must be {shape}"
            for name, shape in wanted.items()
            if name in found and tuple(found[name]) != shape
        ]
        faults = {"missing": missing, "surplus": surplus, "wrongly shaped": wrong}
        parts = [f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names]
        if parts:
            raise ModelError(
                f"the checkpoint's tensors do not fit its config ({self.family}, {self.layers} layers, "
                f"{len(wanted)} tensors): {'; '.join(parts)}"
            )


def _rope(values: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """Rotary settings: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (4)."""
    scaling, kind = _rope_fields(values)
    theta = _number(scaling if "rope_theta" in scaling else values, "rope_theta", 10000.0)
    divisors = scaling.get("frequency_divisors")
    if divisors is not None and (len(divisors) != head_dim // 2 or kind != "default"):
        raise ModelError(
            f"{len(divisors)} rope frequency divisors with rope type {kind!r}; a head of {head_dim} needs "
            f"{head_dim // 2} and type 'default'"
        )
    if kind == "default":
        return RopeConfig(
            theta,
            frequency_divisors=None if divisors is None else tuple(map(float, divisors)),
        )
    if kind == "linear":
        return RopeConfig(theta, "linear", factor=_number(scaling, "factor"))
    low, high = (
        _number(scaling, "low_freq_factor"),
        _number(scaling, "high_freq_factor"),
    )
    if low >= high:
        raise ModelError(f"rope low_freq_factor {low} must be below high_freq_factor {high}")
    original = _count(scaling, "original_max_position_embeddings")
    return RopeConfig(theta, "llama3", _number(scaling, "factor"), low, high, original)


def _rope_fields(values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The rotary fields of either style, and which kind they mean, if all of it is understood."""
    scaling = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    unknown = sorted(key for key in scaling if key not in _ROPE_FIELDS)
    if unknown:
        raise ModelError(
            f"rope field {_some(unknown)} is not understood; understood: {', '.join(sorted(_ROPE_FIELDS))}"
        )
    if scaling.get("partial_rotary_factor", 1) not in (1, None):
        raise ModelError(
            f"partial_rotary_factor = {scaling['partial_rotary_factor']!r} is not supported; supported: 1"
        )
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in get_args(RopeKind):
        raise ModelError(f"rope type {kind!r} is not supported; supported: {', '.join(get_args(RopeKind))}")
    return scaling, kind


def _check_sizes(model: ModelConfig) -> None:
    """Sizes that contradict each other."""
    if model.heads % model.kv_heads:
        raise ModelError(
            f"num_attention_heads {model.heads} is no multiple of num_key_value_heads {model.kv_heads}"
        )
    if model.head_dim % 2:
        raise ModelError(f"head_dim {model.head_dim} is odd; rotary positions need an even one")
    too_large = [token for token in model.eos_token_ids if token >= model.vocab_size]
    if too_large:
        raise ModelError(f"eos_token_id {too_large[0]} is outside the vocabulary of {model.vocab_size}")


def _check_layer_types(config: Mapping[str, Any], layers: int, family: Family) -> None:
    """``layer_types`` must say full attention for every layer; a window has limited the context already."""
    types = config.get("layer_types")
    if types is None:
        return
    allowed = {"full_attention", "sliding_attention"} if family.window_limits_context else {"full_attention"}
    other = sorted(set(map(str, types)) - allowed)
    if other:
        raise ModelError(f"layer_types has {_some(other)}; supported: {', '.join(sorted(allowed))}")
    if len(types) != layers:
        raise ModelError(f"layer_types lists {len(types)} layers, num_hidden_layers is {layers}")


def _count(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of at least one."""
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise ModelError(f"the config lacks {key}")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config field {key} = {value!r} must be a whole number of at least 1")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive finite number."""
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise ModelError(f"the config lacks {key}")
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value) or value <= 0:
        raise ModelError(f"config field {key} = {value!r} must be a positive number")
    return float(value)


def _switch(values: Mapping[str, Any], flag: bool | str) -> bool:
    """A constant of the family, or the config field of that name (absent: false)."""
    if isinstance(flag, bool):
        return flag
    value = values.get(flag)
    if value not in (True, False, None):
        raise ModelError(f"config field {flag} = {value!r} must be true or false")
    return bool(value)


def _token_ids(values: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """One token id, several, or none."""
    value = values.get(key)
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ModelError(f"config field {key} = {value!r} must be a token id or a list of them")
    return tuple(dict.fromkeys(ids))


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = len(listed) - _NAMED_AT_MOST
    return ", ".join(listed[:_NAMED_AT_MOST]) + (f", and {more} more" if more > 0 else "")
