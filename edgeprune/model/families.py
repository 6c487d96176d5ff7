"""Which checkpoints are understood: one short mapping per family from a transformers configuration.

A family says where the weights of decoder.py stand in a checkpoint; everything after it sees the
Decoder alone. Families that are not listed are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgeprune.errors import InputError
from edgeprune.model.decoder import Attention, Decoder, Layer, Mlp, Rotary

Config = dict[str, Any]

OUTER = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
LAYER = {
    "attention.norm": "input_layernorm.weight",
    "attention.q": "self_attn.q_proj.weight",
    "attention.k": "self_attn.k_proj.weight",
    "attention.v": "self_attn.v_proj.weight",
    "attention.o": "self_attn.o_proj.weight",
    "mlp.norm": "post_attention_layernorm.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.down": "mlp.down_proj.weight",
}


@dataclass(frozen=True)
class Family:
    """refuse: why a configuration of this family cannot be handled, or None."""

    model_type: str
    architecture: str
    refuse: Callable[[Config], str | None]


def _plain(config: Config) -> str | None:
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        return f"hidden_act {config['hidden_act']!r} (silu is supported)"
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            return f"{name} true (false is supported)"
    if config.get("quantization_config"):
        return "quantization_config (give the unquantised checkpoint)"
    return None


def _no_window(config: Config) -> str | None:
    window = config.get("sliding_window")
    if window is not None and window < config.get("max_position_embeddings", 0):
        return f"sliding_window {window} (null, or at least max_position_embeddings, is supported)"
    return _plain(config)


FAMILIES = {
    family.model_type: family
    for family in (Family("llama", "LlamaForCausalLM", _plain), Family("mistral", "MistralForCausalLM", _no_window))
}


def family_of(config: Config) -> Family:
    """Raises InputError that names what is not supported, and what is."""
    model_type = config.get("model_type")
    supported = f"Supported are: {', '.join(FAMILIES)} (decoder-only, *ForCausalLM)."
    if model_type not in FAMILIES:
        raise InputError(f"unsupported architecture {model_type or config.get('architectures')!r}", supported)
    family = FAMILIES[model_type]
    architectures = config.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        raise InputError(f"unsupported architecture {', '.join(architectures)}", supported)
    if (reason := family.refuse(config)) is not None:
        raise InputError(f"unsupported {model_type} configuration: {reason}", "Choose another checkpoint.")
    return family


def decoder_of(config: Config) -> Decoder:
    """The Decoder that a configuration describes. Raises InputError naming a missing or senseless field."""
    family = family_of(config)
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        key_value_heads = int(config.get("num_key_value_heads") or heads)
        attention = Attention(heads, key_value_heads, int(config.get("head_dim") or hidden // heads))
        layer = Layer(attention, Mlp(int(config["intermediate_size"])))
        decoder = Decoder(
            family=family.model_type,
            hidden_size=hidden,
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            rotary=_rotary(config, attention.head_dim),
            layers=(layer,) * int(config["num_hidden_layers"]),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"config.json is incomplete or senseless: {error!r}", "Restore the checkpoint's own config.json."
        ) from None
    if heads % key_value_heads:
        raise InputError(
            f"{heads} query heads do not divide into {key_value_heads} key/value heads", "Check config.json."
        )
    return decoder


def _rotary(config: Config, head_dim: int) -> Rotary:
    """Angles from transformers' own functions; newer files say rope_parameters, older rope_scaling."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"unsupported rope scaling {kind!r}", "Supported are: default, linear, llama3.")
    if kind == "default":
        return Rotary(tuple(theta ** (-2.0 * pair / head_dim) for pair in range(head_dim // 2)))
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = _RopeConfig(config, {**parameters, "rope_type": kind, "rope_theta": theta}, head_dim)
    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](scaled, "cpu")
    return Rotary(tuple(frequencies.tolist()), float(scaling))


class _RopeConfig:
    """What transformers' rope functions read of a configuration."""

    def __init__(self, config: Config, parameters: Config, head_dim: int) -> None:
        self.rope_parameters = parameters
        self.rope_scaling = parameters
        self.head_dim = head_dim
        self.hidden_size = config["hidden_size"]
        self.num_attention_heads = config["num_attention_heads"]
        self.max_position_embeddings = config.get("max_position_embeddings", 2048)

    def standardize_rope_params(self) -> None:
        """Already done."""


def checkpoint_names(decoder: Decoder) -> dict[str, str]:
    """Name in the checkpoint of every weight of decoder.py, in its order."""
    names = {}
    for name in decoder.shapes():
        if name.startswith("layers."):
            _, index, part = name.split(".", 2)
            names[name] = f"model.layers.{index}.{LAYER[part]}"
        else:
            names[name] = OUTER[name]
    return names


def config_for(decoder: Decoder, source: Config) -> Config:
    """The configuration of a uniform Decoder that was pruned from `source`.

    LlamaConfig refuses a hidden_size that its head count does not divide, even with head_dim given;
    MistralConfig, of the same weights and names, has no such check.
    """
    if not decoder.is_uniform:
        raise ValueError("a standard configuration describes uniform layers only")
    layer = decoder.layers[0]
    family = FAMILIES[decoder.family]
    config = dict(source)
    if family.model_type == "llama" and decoder.hidden_size % layer.attention.num_attention_heads:
        family = FAMILIES["mistral"]
        config["sliding_window"] = None
        for name in ("attention_bias", "mlp_bias", "pretraining_tp"):
            config.pop(name, None)
    return config | {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "num_attention_heads": layer.attention.num_attention_heads,
        "num_key_value_heads": layer.attention.num_key_value_heads,
        "head_dim": layer.attention.head_dim,
        "intermediate_size": layer.mlp.intermediate_size,
        "tie_word_embeddings": decoder.tie_word_embeddings,
    }
