"""The supported families of checkpoints: one short mapping per family onto decoder.py.

A family has the differences of its configuration from a plain Llama's, and the places of its weights (places.py).
The rest of the program knows only the Decoder. docs/families.md shows how to add a family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from edgeprune.model.checkpoint import names
from edgeprune.model.checkpoint.places import Places
from edgeprune.model.decoder import Decoder, Experts, Grid, Layer, Picture, Rotary
from edgeprune.model.rope import SenselessError, longrope_context, rope_parameters, rotary_of

Config = Mapping[str, Any]
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Family:
    """A family: its model_type, its class in transformers, and its differences from a plain Llama.

    adapt: makes this family's Decoder from that of a plain Llama with the configuration's widths and rotary embedding.
    defaults: the values that transformers uses for fields that config.json leaves out. fields: this family's names for
    some of Llama's fields. activation, norm_eps: the fields with these. heads: which numbers of heads a configuration
    can have: any (`free`), one that divides hidden_size (`divide`), or only hidden_size over head_dim (`fixed`). plain:
    further fields in Llama's words, where more than a name differs. by_layer: the fields with one value for each layer
    that a configuration always has. refuse: returns why a configuration, with its defaults, cannot be handled, or None.
    """

    model_type: str
    architecture: str
    places: Places
    adapt: Callable[[Decoder, Config], Decoder]
    defaults: Config = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    activation: str = "hidden_act"
    norm_eps: str = "rms_norm_eps"
    heads: Literal["free", "divide", "fixed"] = "free"
    plain: Callable[[Config], Config] = lambda config: {}
    by_layer: tuple[str, ...] = ()
    refuse: Callable[[Config], str | None] = lambda config: None


def changed(
    decoder: Decoder, attention: dict[str, Any] | Callable[[int], dict[str, Any]], mlp: dict[str, Any] | None = None
) -> Decoder:
    """Returns the decoder with these fields in every attention, or in that of each layer, and in every MLP."""
    fields_of = attention if callable(attention) else lambda index: attention
    layers = [
        Layer(replace(layer.attention, **fields_of(index)), replace(layer.mlp, **(mlp or {})))
        for index, layer in enumerate(decoder.layers)
    ]
    return replace(decoder, layers=tuple(layers))


def windowed(decoder: Decoder, config: Config, slides: Callable[[int], bool]) -> Decoder:
    """Returns the decoder with a sliding window in the layers of `layer_types`, or else in those that `slides` is true
    for.

    A window as long as all positions counts as none. Raises SenselessError.
    """
    window = config.get("sliding_window")
    if window is None or int(window) >= decoder.max_position_embeddings:
        return decoder
    if int(window) < 1:
        raise SenselessError(f"sliding_window {window}")
    types = _by_layer(config, "layer_types", decoder, LAYER_TYPES)
    indices = range(len(decoder.layers))
    sliding = [kind == "sliding_attention" for kind in types] if types else list(map(slides, indices))
    return changed(decoder, lambda index: {"window": int(window) if sliding[index] else None})


def _by_layer(config: Config, name: str, decoder: Decoder, known: tuple[Any, ...]) -> list[Any] | None:
    """Returns a field with one known value for each layer; None where it is left out. Raises SenselessError."""
    values = config.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != len(decoder.layers) or not set(values) <= set(known):
        raise SenselessError(f"{name} {values!r} for {len(decoder.layers)} layers")
    return values


def _biases(decoder: Decoder, config: Config) -> Decoder:
    attends, has = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    attention = {"input_bias": attends, "output_bias": attends}
    return changed(decoder, attention, {"input_bias": has, "output_bias": has})


def _all_slide(decoder: Decoder, config: Config) -> Decoder:
    """Returns the decoder with a window in every layer, unless `layer_types` names others."""
    return windowed(decoder, config, lambda index: True)


def _late_slide(decoder: Decoder, config: Config) -> Decoder:
    """Returns the decoder with a window in the layers from max_window_layers on, where windows are used at all."""
    if not config.get("use_sliding_window"):
        return decoder
    first = int(config.get("max_window_layers") or 0)
    return windowed(decoder, config, lambda index: index >= first)


def _qwen2(decoder: Decoder, config: Config) -> Decoder:
    return changed(_late_slide(decoder, config), {"input_bias": True})


def _qwen3(decoder: Decoder, config: Config) -> Decoder:
    return changed(_biases(_late_slide(decoder, config), config), {"qk_norm": "head"})


def _qwen3_moe(decoder: Decoder, config: Config) -> Decoder:
    count = int(config.get("num_local_experts") or config["num_experts"])  # newer and older files
    experts = Experts(count, int(config["num_experts_per_tok"]), bool(config["norm_topk_prob"]))
    sliding = bool(config.get("use_sliding_window"))
    decoder = _qwen3(decoder, {**config, "use_sliding_window": False})
    return changed(_all_slide(decoder, config) if sliding else decoder, {}, {"experts": experts})


def _mixtral(decoder: Decoder, config: Config) -> Decoder:
    experts = Experts(int(config["num_local_experts"]), int(config["num_experts_per_tok"]))
    return changed(_all_slide(decoder, config), {}, {"experts": experts})


def _gemma(decoder: Decoder, config: Config) -> Decoder:
    scale = float(config["query_pre_attn_scalar"]) ** -0.5
    attention = {"scale": scale, "softcap": _cap(config, "attn_logit_softcapping")}
    return replace(
        changed(_biases(decoder, config), attention),
        norms="both",
        embedding_scale=math.sqrt(decoder.hidden_size),
        logits_softcap=_cap(config, "final_logit_softcapping"),
    )


def _cap(config: Config, name: str) -> float | None:
    return None if config.get(name) is None else float(config[name])


def _gemma2(decoder: Decoder, config: Config) -> Decoder:
    return _gemma(windowed(decoder, config, lambda index: index % 2 == 0), config)


def _gemma3(decoder: Decoder, config: Config) -> Decoder:
    """Returns a Gemma 3's decoder; layers with a window have a theta of their own, however long the window is."""
    pattern = int(config.get("sliding_window_pattern") or 6)
    types = _by_layer(config, "layer_types", decoder, LAYER_TYPES)
    local = (
        [kind == "sliding_attention" for kind in types]
        if types
        else [(index + 1) % pattern != 0 for index in range(len(decoder.layers))]
    )
    rotaries = _gemma3_rotaries(config, decoder.layers[0].attention.head_dim)
    window = int(config["sliding_window"])
    decoder = changed(decoder, lambda i: {"rotary": rotaries[local[i]], "window": window if local[i] else None})
    return _gemma(changed(decoder, {"qk_norm": "head"}), config)


def _gemma3_rotaries(config: Config, head_dim: int) -> tuple[Rotary, Rotary]:
    """Returns the rotary embeddings of the full and of the sliding layers, from newer or older fields."""
    parameters = rope_parameters(config)
    if not {"full_attention", "sliding_attention"} & parameters.keys():
        # Older files have the parameters of the full layers and rope_local_base_freq.
        local = {"rope_theta": float(config.get("rope_local_base_freq") or 10000.0)}
        parameters = {"full_attention": parameters, "sliding_attention": local}
    full, local = (parameters.get(name) or {} for name in LAYER_TYPES)
    base = {name: value for name, value in config.items() if name != "rope_theta"}
    return rotary_of(full, config, head_dim, 1_000_000.0), rotary_of(local, base, head_dim)


def _phi3(decoder: Decoder, config: Config) -> Decoder:
    """Returns a Phi-3's decoder, with the positions for which longrope's short factors hold."""
    context = longrope_context(rope_parameters(config), config)
    decoder = _all_slide(decoder, config)
    return decoder if context is None else replace(decoder, max_position_embeddings=context)


def _smollm3(decoder: Decoder, config: Config) -> Decoder:
    interval = int(config.get("no_rope_layer_interval") or 4)
    rotates = _by_layer(config, "no_rope_layers", decoder, (0, 1)) or [
        int((index + 1) % interval != 0) for index in range(len(decoder.layers))
    ]
    if config.get("use_sliding_window"):
        decoder = windowed(decoder, config, lambda index: not rotates[index])
    rotary = decoder.layers[0].attention.rotary
    return changed(_biases(decoder, config), lambda index: {"rotary": rotary if rotates[index] else None})


def _olmo2(decoder: Decoder, config: Config) -> Decoder:
    return replace(changed(_biases(decoder, config), {"qk_norm": "all"}), norms="after")


def _granite(decoder: Decoder, config: Config) -> Decoder:
    return replace(
        changed(_biases(decoder, config), {"scale": float(config["attention_multiplier"])}),
        embedding_scale=float(config["embedding_multiplier"]),
        residual_scale=float(config["residual_multiplier"]),
        logits_scale=1.0 / float(config["logits_scaling"]),
    )


def _layer_norms(decoder: Decoder, has_bias: bool = True) -> Decoder:
    """Returns the decoder with LayerNorms and a plain MLP, with biases or without."""
    biases = {"input_bias": has_bias, "output_bias": has_bias}
    return replace(changed(decoder, biases, {"gated": False, **biases}), norm="layer")


def _learned(decoder: Decoder) -> Decoder:
    """Returns the decoder with learned positions instead of rotary ones, LayerNorms and a plain MLP."""
    return replace(changed(_layer_norms(decoder), {"rotary": None}), learned_positions=True)


def _plain_gpt2(config: Config) -> Config:
    return {} if config.get("n_inner") is not None else {"intermediate_size": 4 * int(config["n_embd"])}


def _plain_gpt_neox(config: Config) -> Config:
    """Returns rope fields by Llama's names; rope parameters with the same meaning take precedence over them."""
    names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    return {name: config[own] for name, own in names.items() if config.get(own) is not None}


def _gpt2(decoder: Decoder, config: Config) -> Decoder:
    return changed(_learned(decoder), {} if config["scale_attn_weights"] else {"scale": 1.0})


def _gpt_neox(decoder: Decoder, config: Config) -> Decoder:
    attends = bool(config["attention_bias"])
    decoder = changed(_layer_norms(decoder), {"input_bias": attends, "output_bias": attends})
    return replace(decoder, parallel=bool(config["use_parallel_residual"]))


def _starcoder2(decoder: Decoder, config: Config) -> Decoder:
    return _layer_norms(_all_slide(decoder, config), bool(config["use_bias"]))


def _plain_llamagen(config: Config) -> Config:
    return {"max_position_embeddings": LLAMAGEN_PREFIX + int(config["image_side"]) ** 2}


def _llamagen(decoder: Decoder, config: Config) -> Decoder:
    picture = Picture(int(config["image_side"]), int(config["num_classes"]), bool(config["has_null_class"]))
    head_dim = decoder.layers[0].attention.head_dim
    if head_dim % 4:
        raise SenselessError(f"head_dim {head_dim} (a multiple of 4 is supported)")
    # Half of a head's dimensions are rotated by the row, half by the column, both with the frequencies of half a head.
    half = rotary_of({}, config, head_dim // 2)
    rotary = replace(half, inverse_frequencies=2 * half.inverse_frequencies, grid=Grid(LLAMAGEN_PREFIX, picture.side))
    return replace(changed(decoder, {"rotary": rotary}), picture=picture)


def _plain_imagegpt(config: Config) -> Config:
    """Returns fields by Llama's names; ImageGPT's vocabulary counts the opening token, which has no logit."""
    return _plain_gpt2(config) | {"vocab_size": int(config["vocab_size"]) - 1}


def _imagegpt(decoder: Decoder, config: Config) -> Decoder:
    picture = Picture(math.isqrt(decoder.max_position_embeddings), 0)
    return replace(_gpt2(decoder, config), norm="rms", picture=picture)


def _refuse_imagegpt(config: Config) -> str | None:
    if config.get("tie_word_embeddings"):
        return "tie_word_embeddings true (false is supported)"
    return _refuse_gpt2(config)


def _refuse_gpt2(config: Config) -> str | None:
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        if config.get(name):
            return f"{name} true (false is supported)"
    return None


def _refuse_opt(config: Config) -> str | None:
    if config.get("word_embed_proj_dim") not in (None, config.get("hidden_size")):
        return f"word_embed_proj_dim {config['word_embed_proj_dim']} (hidden_size is supported)"
    for name in ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine"):
        if config.get(name) is False:
            return f"{name} false (true is supported)"
    return "_remove_final_layer_norm true" if config.get("_remove_final_layer_norm") else None


def _refuse_mixed(config: Config) -> str | None:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return "layers without experts among those with them (mlp_only_layers, decoder_sparse_step)"
    return None


def _refuse_bidirectional(config: Config) -> str | None:
    return "use_bidirectional_attention true" if config.get("use_bidirectional_attention") else None


GRANITE_SCALES = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
CONTEXT = {"max_position_embeddings": 2048}
LLAMAGEN_PREFIX = 1  # the class
GPT2_FIELDS = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
}
GPT2_DEFAULTS = {
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "layer_norm_epsilon": 1e-5,
}

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", names.LLAMA, _biases, CONTEXT, heads="divide"),
        Family(
            "mistral",
            "MistralForCausalLM",
            names.LLAMA,
            _all_slide,
            {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            names.LLAMA,
            _qwen2,
            {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            names.QWEN3,
            _qwen3,
            {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            names.GEMMA2,
            _gemma2,
            {
                "max_position_embeddings": 8192,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "sliding_window": 4096,
                "query_pre_attn_scalar": 256,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "tie_word_embeddings": True,
                "hidden_activation": "gelu_pytorch_tanh",
            },
            activation="hidden_activation",
            heads="divide",
            refuse=_refuse_bidirectional,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            names.GEMMA3,
            _gemma3,
            {
                "max_position_embeddings": 131072,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "sliding_window": 4096,
                "query_pre_attn_scalar": 256,
                "tie_word_embeddings": True,
                "hidden_activation": "gelu_pytorch_tanh",
            },
            activation="hidden_activation",
            heads="divide",
            by_layer=("layer_types",),
            refuse=_refuse_bidirectional,
        ),
        Family("phi3", "Phi3ForCausalLM", names.PHI3, _phi3, {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            names.LLAMA,
            _smollm3,
            {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 4,
                "rope_theta": 2000000.0,
                "tie_word_embeddings": True,
            },
            by_layer=("no_rope_layers",),
        ),
        Family("olmo2", "Olmo2ForCausalLM", names.OLMO2, _olmo2, CONTEXT | {"rms_norm_eps": 1e-5}),
        Family("granite", "GraniteForCausalLM", names.LLAMA, _granite, CONTEXT | dict.fromkeys(GRANITE_SCALES, 1.0)),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            names.GPT2,
            _gpt2,
            GPT2_DEFAULTS,
            GPT2_FIELDS,
            activation="activation_function",
            norm_eps="layer_norm_epsilon",
            heads="fixed",
            plain=_plain_gpt2,
            refuse=_refuse_gpt2,
        ),
        Family(
            "opt",
            "OPTForCausalLM",
            names.OPT,
            lambda decoder, config: _learned(decoder),
            {
                "max_position_embeddings": 2048,
                "activation_function": "relu",
                "tie_word_embeddings": True,
                "layer_norm_eps": 1e-5,
            },
            {"intermediate_size": "ffn_dim"},
            activation="activation_function",
            norm_eps="layer_norm_eps",
            heads="fixed",
            refuse=_refuse_opt,
        ),
        Family(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            names.GPT_NEOX,
            _gpt_neox,
            {
                "max_position_embeddings": 2048,
                "attention_bias": True,
                "use_parallel_residual": True,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-5,
                "rotary_pct": 0.25,
            },
            norm_eps="layer_norm_eps",
            heads="fixed",
            plain=_plain_gpt_neox,
        ),
        Family(
            "starcoder2",
            "Starcoder2ForCausalLM",
            names.STARCODER2,
            _starcoder2,
            {
                "max_position_embeddings": 4096,
                "num_key_value_heads": 2,
                "hidden_act": "gelu_pytorch_tanh",
                "norm_epsilon": 1e-5,
                "use_bias": True,
                "tie_word_embeddings": True,
            },
            norm_eps="norm_epsilon",
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            names.MIXTRAL,
            _mixtral,
            {
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "rms_norm_eps": 1e-5,
            },
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            names.QWEN3_MOE,
            _qwen3_moe,
            {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 4,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "norm_topk_prob": False,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
            {"intermediate_size": "moe_intermediate_size"},
            refuse=_refuse_mixed,
        ),
        Family(
            "imagegpt",
            "ImageGPTForCausalImageModeling",
            names.GPT2,
            _imagegpt,
            GPT2_DEFAULTS | {"activation_function": "quick_gelu", "tie_word_embeddings": False, "vocab_size": 513},
            GPT2_FIELDS,
            activation="activation_function",
            norm_eps="layer_norm_epsilon",
            heads="fixed",
            plain=_plain_imagegpt,
            refuse=_refuse_imagegpt,
        ),
        Family(
            "llamagen",
            "LlamaGenForCausalImage",
            names.LLAMAGEN,
            _llamagen,
            {"rms_norm_eps": 1e-5},
            plain=_plain_llamagen,
        ),
    )
}
