"""Which checkpoints are understood: one short mapping per family from a transformers configuration.

A family says where the weights of decoder.py stand in a checkpoint; everything after it sees the
Decoder alone. Families that are not listed are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
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


MAX_LAYERS, MAX_SIZE = 10_000, 2**31  # beyond any model; a damaged file must not ask for all memory


@dataclass(frozen=True)
class Family:
    """defaults: what transformers takes for a field that config.json leaves out, where families differ.

    refuse: why a configuration of this family, with its defaults, cannot be handled, or None.
    """

    model_type: str
    architecture: str
    defaults: Config
    refuse: Callable[[Config], str | None]


def _plain(config: Config) -> str | None:
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        return f"hidden_act {config['hidden_act']!r} (silu is supported)"
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            return f"{name} true (false is supported)"
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    partial = (rope.get("partial_rotary_factor") if isinstance(rope, dict) else None) or config.get(
        "partial_rotary_factor"
    )
    if partial not in (None, 1):
        return f"partial_rotary_factor {partial} (1 is supported)"
    if config.get("quantization_config"):
        return "quantization_config (give the unquantised checkpoint)"
    return None


def _no_window(config: Config) -> str | None:
    window = config.get("sliding_window")
    if window is not None and window < config["max_position_embeddings"]:
        return f"sliding_window {window} (null, or at least max_position_embeddings, is supported)"
    return _plain(config)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", {"max_position_embeddings": 2048}, _plain),
        Family(
            "mistral",
            "MistralForCausalLM",
            {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
            _no_window,
        ),
    )
}
LAYER_WIDTHS = "edgeprune_layer_widths"  # key/value heads, query heads per group, MLP channels of every layer


def family_of(config: Config) -> Family:
    """Raises InputError that names what is not supported, and what is."""
    model_type = config.get("model_type")
    supported = f"Supported are: {', '.join(FAMILIES)} (decoder-only, *ForCausalLM)."
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(f"unsupported architecture {model_type or config.get('architectures')!r}", supported)
    family = FAMILIES[model_type]
    architectures = config.get("architectures") or [family.architecture]
    if not isinstance(architectures, list):
        raise _senseless(f"architectures {architectures!r}")
    if family.architecture not in architectures:
        raise InputError(f"unsupported architecture {', '.join(map(str, architectures))}", supported)
    try:
        reason = family.refuse(family.defaults | config)
    except TypeError as error:
        raise _senseless(error) from None
    if reason is not None:
        raise InputError(f"unsupported {model_type} configuration: {reason}", "Choose another checkpoint.")
    return family


def _senseless(reason: object) -> InputError:
    return InputError(f"config.json is incomplete or senseless: {reason}", "Restore the checkpoint's own config.json.")


def decoder_of(config: Config) -> Decoder:
    """The Decoder that a configuration describes. Raises InputError naming a missing or senseless field."""
    family = family_of(config)
    config = family.defaults | config
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        key_value_heads = int(config.get("num_key_value_heads") or heads)
        attention = Attention(heads, key_value_heads, int(config.get("head_dim") or hidden // heads))
        _check_sizes(config, attention)
        layer = Layer(attention, Mlp(int(config["intermediate_size"])))
        decoder = Decoder(
            family=family.model_type,
            hidden_size=hidden,
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=int(config["max_position_embeddings"]),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            rotary=_rotary(config, attention.head_dim),
            layers=(layer,) * int(config["num_hidden_layers"]),
        )
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise _senseless(repr(error)) from None
    if not all(map(math.isfinite, (*decoder.rotary.inverse_frequencies, decoder.rotary.scaling, decoder.norm_eps))):
        raise _senseless("its rope parameters or its rms_norm_eps are not finite")
    if heads % key_value_heads:
        raise InputError(
            f"{heads} query heads do not divide into {key_value_heads} key/value heads", "Check config.json."
        )
    return _with_own_widths(decoder, config[LAYER_WIDTHS]) if LAYER_WIDTHS in config else decoder


def _with_own_widths(decoder: Decoder, widths: object) -> Decoder:
    """Of a model that was pruned to other widths in every layer; InputError for a field that is none of ours."""
    try:
        checked = [(int(groups), int(heads), int(channels)) for groups, heads, channels in widths]
        if min(map(min, checked)) < 0 or min(heads for _, heads, _ in checked) < 1:
            raise ValueError("widths below zero")
        return decoder.with_layer_widths(checked)
    except (TypeError, ValueError) as error:
        raise _senseless(f"{LAYER_WIDTHS}: {error}") from None


def _check_sizes(config: Config, attention: Attention) -> None:
    """Raises InputError for a size that no model has."""
    sizes = {
        name: int(config[name])
        for name in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "max_position_embeddings")
    } | vars(attention)
    for name, size in sizes.items():
        limit = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
        if not 0 < size < limit:
            raise _senseless(f"{name} {size}")
    if attention.head_dim % 2 or attention.head_dim > sizes["hidden_size"]:
        raise _senseless(f"head_dim {attention.head_dim} (even, at most hidden_size, is supported)")


def _rotary(config: Config, head_dim: int) -> Rotary:
    """Angles as transformers computes them; newer files say rope_parameters, older rope_scaling.

    transformers prefers rope_scaling where a file has both.
    """
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if not 0 < theta < math.inf:
        raise _senseless(f"rope_theta {theta}")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    frequencies = tuple(theta ** (-2.0 * pair / head_dim) for pair in range(head_dim // 2))
    match kind:
        case "default":
            return Rotary(frequencies)
        case "linear":
            factor = float(parameters["factor"])
            return Rotary(tuple(frequency / factor for frequency in frequencies))
        case "llama3":
            return Rotary(tuple(_llama3(frequency, parameters) for frequency in frequencies))
    raise InputError(f"unsupported rope scaling {kind!r}", "Supported are: default, linear, llama3.")


def _llama3(frequency: float, parameters: Config) -> float:
    """Llama 3.1's scaling: a pair that turns `high` times or more within the original context keeps its
    frequency, one that turns `low` times or fewer has it divided by `factor`, between them it is blended."""
    factor, low, high, context = (
        float(parameters[name])
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if not low < high:
        raise _senseless(f"low_freq_factor {low:g} is not below high_freq_factor {high:g}")
    turns = context * frequency / (2 * math.pi)
    kept = min(1.0, max(0.0, (turns - low) / (high - low)))
    return frequency * (kept + (1 - kept) / factor)


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
    """The configuration of a Decoder that was pruned from `source`; all else is kept.

    It is a standard one where all layers are whole and alike; else it says their widths in a field of our own.
    LlamaConfig refuses a hidden_size that its head count does not divide, even with head_dim given;
    MistralConfig, of the same weights and names, has no such check.
    """
    layer = decoder.layers[0]
    if not decoder.is_uniform or layer.attention is None or layer.mlp is None:
        return source | {"num_hidden_layers": len(decoder.layers), LAYER_WIDTHS: decoder.layer_widths}
    family = FAMILIES[decoder.family]
    config = {name: value for name, value in source.items() if name not in ("auto_map", "_name_or_path", "torch_dtype")}
    if family.model_type == "llama" and decoder.hidden_size % layer.attention.num_attention_heads:
        family = FAMILIES["mistral"]
        config["sliding_window"] = None
        for name in ("attention_bias", "mlp_bias", "pretraining_tp"):
            config.pop(name, None)
        # without it transformers takes any large vocabulary of a `mistral` for an old one with a wrong pattern
        config["transformers_version"] = version("transformers")
    return config | {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": layer.attention.num_attention_heads,
        "num_key_value_heads": layer.attention.num_key_value_heads,
        "head_dim": layer.attention.head_dim,
        "intermediate_size": layer.mlp.intermediate_size,
        "max_position_embeddings": decoder.max_position_embeddings,
        "tie_word_embeddings": decoder.tie_word_embeddings,
    }
