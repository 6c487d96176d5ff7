"""The functions by which families.py describes what a family does otherwise than a plain Llama.

Those of a family's name make its Decoder from a plain Llama's; `plain_*` give its fields in Llama's words; `refuse_*`
say why a configuration cannot be handled. They know no names of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from edgeprune.model.decoder import Decoder, Experts, Grid, Layer, Picture, Rotary
from edgeprune.model.rope import (
    ORIGINAL_CONTEXT,
    SenselessError,
    longrope_context,
    original_context,
    rope_parameters,
    rotary_of,
)

Config = Mapping[str, Any]
LAYER_TYPES = ("full_attention", "sliding_attention")
FORMER_TYPES = {"attention": "full_attention"}  # names of older files, which transformers reads
LLAMAGEN_PREFIX = 1  # the class
APERTUS_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12000000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


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
    if name == "layer_types" and isinstance(values, list):
        values = [FORMER_TYPES.get(value, value) if isinstance(value, str) else value for value in values]
    if not isinstance(values, list) or len(values) != len(decoder.layers) or not set(values) <= set(known):
        raise SenselessError(f"{name} {values!r} for {len(decoder.layers)} layers")
    return values


def _sliding(decoder: Decoder, config: Config, every: int) -> list[bool]:
    """Returns which layers have a window: those of `layer_types`, or else all but one in so many."""
    if types := _by_layer(config, "layer_types", decoder, LAYER_TYPES):
        return [kind == "sliding_attention" for kind in types]
    return [(index + 1) % every != 0 for index in range(len(decoder.layers))]


def biases(decoder: Decoder, config: Config) -> Decoder:
    has = bool(config.get("mlp_bias"))
    return changed(_attention_biases(decoder, config), {}, {"input_bias": has, "output_bias": has})


def _attention_biases(decoder: Decoder, config: Config) -> Decoder:
    has = bool(config.get("attention_bias"))
    return changed(decoder, {"input_bias": has, "output_bias": has})


def all_slide(decoder: Decoder, config: Config) -> Decoder:
    """Returns the decoder with a window in every layer, whatever `layer_types` names: these families do not read it."""
    return windowed(decoder, {**config, "layer_types": None}, lambda index: True)


def _late_slide(decoder: Decoder, config: Config) -> Decoder:
    """Returns the decoder with a window in the layers from max_window_layers on, where windows are used at all."""
    if not config.get("use_sliding_window"):
        return decoder
    first = int(config.get("max_window_layers") or 0)
    return windowed(decoder, config, lambda index: index >= first)


def qwen2(decoder: Decoder, config: Config) -> Decoder:
    return changed(_late_slide(decoder, config), {"input_bias": True})


def qwen3(decoder: Decoder, config: Config) -> Decoder:
    return changed(_attention_biases(_late_slide(decoder, config), config), {"qk_norm": "head"})


def qwen3_moe(decoder: Decoder, config: Config) -> Decoder:
    count = int(config.get("num_local_experts") or config["num_experts"])  # newer and older files
    experts = Experts(count, int(config["num_experts_per_tok"]), bool(config["norm_topk_prob"]))
    sliding = bool(config.get("use_sliding_window"))
    decoder = qwen3(decoder, {**config, "use_sliding_window": False})
    return changed(all_slide(decoder, config) if sliding else decoder, {}, {"experts": experts})


def olmoe(decoder: Decoder, config: Config) -> Decoder:
    experts = Experts(int(config["num_experts"]), int(config["num_experts_per_tok"]), bool(config["norm_topk_prob"]))
    return changed(_attention_biases(decoder, config), {"qk_norm": "all"}, {"experts": experts})


def mixtral(decoder: Decoder, config: Config) -> Decoder:
    experts = Experts(int(config["num_local_experts"]), int(config["num_experts_per_tok"]))
    return changed(all_slide(decoder, config), {}, {"experts": experts})


def plain_gpt_oss(config: Config) -> Config:
    return {} if rope_parameters(config) else {"rope_parameters": GPT_OSS_ROPE}


def gpt_oss(decoder: Decoder, config: Config) -> Decoder:
    experts = Experts(int(config["num_local_experts"]), int(config["num_experts_per_tok"]), bias=True)
    limit = float(config["swiglu_limit"])
    if not limit > 0:
        raise SenselessError(f"swiglu_limit {limit:g}")
    fields = {"activation": "gelu_quick", "limit": limit, "up_shift": 1.0, "input_bias": True, "output_bias": True}
    decoder = windowed(_attention_biases(decoder, config), config, lambda index: index % 2 == 0)
    return changed(decoder, {"sinks": True}, fields | {"experts": experts})


def _gemma(decoder: Decoder, config: Config) -> Decoder:
    scalar = float(config["query_pre_attn_scalar"])
    if scalar <= 0:
        raise SenselessError(f"query_pre_attn_scalar {scalar:g}")
    scale = scalar**-0.5
    return replace(
        changed(_attention_biases(decoder, config), {"scale": scale}),
        norms="both",
        embedding_scale=math.sqrt(decoder.hidden_size),
        logits_softcap=_cap(config, "final_logit_softcapping"),
    )


def _cap(config: Config, name: str) -> float | None:
    return None if config.get(name) is None else float(config[name])


def gemma(decoder: Decoder, config: Config) -> Decoder:
    return replace(_attention_biases(decoder, config), embedding_scale=math.sqrt(decoder.hidden_size))


def gemma2(decoder: Decoder, config: Config) -> Decoder:
    decoder = windowed(decoder, config, lambda index: index % 2 == 0)
    return _gemma(changed(decoder, {"softcap": _cap(config, "attn_logit_softcapping")}), config)


def gemma3(decoder: Decoder, config: Config) -> Decoder:
    """Returns a Gemma 3's decoder; layers with a window have a theta of their own, however long the window is."""
    thetas = config.get("rope_theta") or 1_000_000.0, config.get("rope_local_base_freq") or 10000.0
    decoder = _by_kind(decoder, config, int(config.get("sliding_window_pattern") or 6), thetas)
    return _gemma(changed(decoder, {"qk_norm": "head"}), config)


def _by_kind(decoder: Decoder, config: Config, every: int, thetas: tuple[float, float]) -> Decoder:
    """Returns the decoder with windows, however long, in all layers but one in `every`, and rotary embeddings by kind.

    thetas: of the full and of the sliding layers, where no set of parameters names one.
    """
    slides, window = _sliding(decoder, config, every), int(config["sliding_window"])
    rotaries = _rotaries(config, decoder.layers[0].attention.head_dim, thetas)
    return changed(decoder, lambda i: {"rotary": rotaries[slides[i]], "window": window if slides[i] else None})


def _rotaries(config: Config, head_dim: int, thetas: tuple[float, float]) -> tuple[Rotary, Rotary]:
    """Returns the rotary embeddings of the full and of the sliding layers, from newer or older fields.

    rope_scaling is that of the full layers; of rope_parameters only the sets by kind of layer are read.
    """
    sets, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    full, local = (sets.get(name) or {} for name in LAYER_TYPES)
    base = {name: value for name, value in config.items() if name not in ("rope_theta", ORIGINAL_CONTEXT)}
    full = {"rope_type": "default", **full, **scaling}
    return rotary_of(full, base, head_dim, thetas[0]), rotary_of(local, base, head_dim, thetas[1])


def phi3(decoder: Decoder, config: Config) -> Decoder:
    """Returns a Phi-3's decoder, with the positions for which longrope's short factors hold."""
    context = longrope_context(rope_parameters(config), config)
    decoder = all_slide(decoder, config)
    return decoder if context is None else replace(decoder, max_position_embeddings=context)


def smollm3(decoder: Decoder, config: Config) -> Decoder:
    interval = int(config.get("no_rope_layer_interval") or 4)
    rotates = _by_layer(config, "no_rope_layers", decoder, (0, 1)) or [
        int((index + 1) % interval != 0) for index in range(len(decoder.layers))
    ]
    if config.get("use_sliding_window"):
        decoder = windowed(decoder, config, lambda index: not rotates[index])
    rotary = decoder.layers[0].attention.rotary
    return changed(biases(decoder, config), lambda index: {"rotary": rotary if rotates[index] else None})


def olmo2(decoder: Decoder, config: Config) -> Decoder:
    return replace(changed(_attention_biases(decoder, config), {"qk_norm": "all"}), norms="after")


def olmo3(decoder: Decoder, config: Config) -> Decoder:
    """Returns an OLMo 3's decoder; a rope_theta beside the parameters is that of the full layers alone."""
    return olmo2(_by_kind(decoder, config, 4, (config.get("rope_theta") or 500_000.0, 500_000.0)), config)


def exaone4(decoder: Decoder, config: Config) -> Decoder:
    """Returns an EXAONE 4's decoder; where some layers have a window, the others have no rotary positions."""
    decoder = replace(changed(decoder, {"qk_norm": "head"}), norms="after")
    if config.get("sliding_window") is None:
        return decoder
    # A pattern of letters comes with layer_types.
    every = 1 if config.get("layer_types") else int(config["sliding_window_pattern"])
    slides, window = _sliding(decoder, config, every), int(config["sliding_window"])
    if window < 1:
        raise SenselessError(f"sliding_window {window}")
    rotary = decoder.layers[0].attention.rotary
    return changed(
        decoder, lambda i: {"window": window if slides[i] else None, "rotary": rotary if slides[i] else None}
    )


def hunyuan(decoder: Decoder, config: Config) -> Decoder:
    """Returns a Hunyuan's decoder; its `dynamic` rope with an alpha is one with another base (NTK-aware)."""
    parameters, rotary = rope_parameters(config), decoder.layers[0].attention.rotary
    kind = parameters.get("rope_type") or parameters.get("type")
    if kind == "dynamic" and (alpha := parameters.get("alpha")):
        dim = decoder.layers[0].attention.head_dim
        base = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
        rotary = rotary_of({"rope_theta": base * float(alpha) ** (dim / (dim - 2))}, {}, dim)
    # The norm behind the rotation takes any factor of cos and sin out again.
    return changed(_attention_biases(decoder, config), {"rotary": replace(rotary, scaling=1.0), "qk_norm": "turned"})


def plain_apertus(config: Config) -> Config:
    return {} if rope_parameters(config) else {"rope_parameters": APERTUS_ROPE}


def apertus(decoder: Decoder, config: Config) -> Decoder:
    return changed(_attention_biases(decoder, config), {"qk_norm": "head"}, {"gated": False, "activation": "xielu"})


def ernie(decoder: Decoder, config: Config) -> Decoder:
    has = bool(config.get("use_bias"))
    return biases(decoder, {"attention_bias": has, "mlp_bias": has})


def ministral3(decoder: Decoder, config: Config) -> Decoder:
    """Returns a Ministral 3's decoder, with the positions of the original context: beyond them queries would grow."""
    parameters, decoder = rope_parameters(config), all_slide(decoder, config)
    if not parameters.get("llama_4_scaling_beta"):
        return decoder
    return replace(
        decoder, max_position_embeddings=min(decoder.max_position_embeddings, original_context(parameters, config))
    )


def granite_hybrid(decoder: Decoder, config: Config) -> Decoder:
    decoder = granite(decoder, {**config, "mlp_bias": False})
    return decoder if config.get("position_embedding_type") == "rope" else changed(decoder, {"rotary": None})


def stablelm(decoder: Decoder, config: Config) -> Decoder:
    return replace(changed(decoder, {"input_bias": bool(config.get("use_qkv_bias"))}), norm="layer")


def granite(decoder: Decoder, config: Config) -> Decoder:
    return replace(
        changed(biases(decoder, config), {"scale": float(config["attention_multiplier"])}),
        embedding_scale=float(config["embedding_multiplier"]),
        residual_scale=float(config["residual_multiplier"]),
        logits_scale=1.0 / float(config["logits_scaling"]),
    )


def _layer_norms(decoder: Decoder, has_bias: bool = True) -> Decoder:
    """Returns the decoder with LayerNorms and a plain MLP, with biases or without."""
    biases = {"input_bias": has_bias, "output_bias": has_bias}
    return replace(changed(decoder, biases, {"gated": False, **biases}), norm="layer")


def learned(decoder: Decoder) -> Decoder:
    """Returns the decoder with learned positions instead of rotary ones, LayerNorms and a plain MLP."""
    return replace(changed(_layer_norms(decoder), {"rotary": None}), learned_positions=True)


def plain_gpt2(config: Config) -> Config:
    return {} if config.get("n_inner") is not None else {"intermediate_size": 4 * int(config["n_embd"])}


def plain_gpt_neox(config: Config) -> Config:
    """Returns rope fields by Llama's names, which are not read; rope parameters take precedence over them."""
    return {"rope_theta": config.get("rotary_emb_base"), "partial_rotary_factor": config["rotary_pct"]}


def gpt2(decoder: Decoder, config: Config) -> Decoder:
    return changed(learned(decoder), {} if config["scale_attn_weights"] else {"scale": 1.0})


def gpt_neox(decoder: Decoder, config: Config) -> Decoder:
    attends = bool(config["attention_bias"])
    decoder = changed(_layer_norms(decoder), {"input_bias": attends, "output_bias": attends})
    return replace(decoder, parallel=bool(config["use_parallel_residual"]))


def starcoder2(decoder: Decoder, config: Config) -> Decoder:
    return _layer_norms(all_slide(decoder, config), bool(config["use_bias"]))


def plain_llamagen(config: Config) -> Config:
    return {"max_position_embeddings": LLAMAGEN_PREFIX + int(config["image_side"]) ** 2}


def llamagen(decoder: Decoder, config: Config) -> Decoder:
    picture = Picture(int(config["image_side"]), int(config["num_classes"]), bool(config["has_null_class"]))
    head_dim = decoder.layers[0].attention.head_dim
    if head_dim % 4:
        raise SenselessError(f"head_dim {head_dim} (a multiple of 4 is supported)")
    # Half of a head's dimensions are rotated by the row, half by the column, both with the frequencies of half a head.
    half = rotary_of({}, config, head_dim // 2)
    rotary = replace(half, inverse_frequencies=2 * half.inverse_frequencies, grid=Grid(LLAMAGEN_PREFIX, picture.side))
    return replace(changed(decoder, {"rotary": rotary}), picture=picture)


def plain_imagegpt(config: Config) -> Config:
    """Returns fields by Llama's names; ImageGPT's vocabulary counts the opening token, which has no logit."""
    return plain_gpt2(config) | {"vocab_size": int(config["vocab_size"]) - 1}


def imagegpt(decoder: Decoder, config: Config) -> Decoder:
    picture = Picture(math.isqrt(decoder.max_position_embeddings), 0)
    return replace(gpt2(decoder, config), norm="rms", picture=picture)


def refuse_imagegpt(config: Config) -> str | None:
    if config.get("tie_word_embeddings"):
        return "tie_word_embeddings true (false is supported)"
    return refuse_gpt2(config)


def refuse_gpt2(config: Config) -> str | None:
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        if config.get(name):
            return f"{name} true (false is supported)"
    return None


def plain_opt(config: Config) -> Config:
    return {"layer_norm_eps": 1e-5}  # of every LayerNorm, whatever a configuration says


def refuse_phi3(config: Config) -> str | None:
    parameters = rope_parameters(config)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    return None if kind in ("default", "longrope", "su") else f"rope scaling {kind!r} (longrope is supported)"


def refuse_gpt_neox(config: Config) -> str | None:
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if config.get("head_dim") and heads and config["head_dim"] != hidden // heads:
        return f"head_dim {config['head_dim']} (hidden_size over num_attention_heads is supported)"
    return None


def refuse_opt(config: Config) -> str | None:
    if config.get("word_embed_proj_dim") not in (None, config.get("hidden_size")):
        return f"word_embed_proj_dim {config['word_embed_proj_dim']} (hidden_size is supported)"
    for name in ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine"):
        if config.get(name) is False:
            return f"{name} false (true is supported)"
    return "_remove_final_layer_norm true" if config.get("_remove_final_layer_norm") else None


def refuse_gpt_oss(config: Config) -> str | None:
    alpha = config["swiglu_alpha"]
    return None if alpha == 1.702 else f"swiglu_alpha {alpha} (1.702 is supported)"


def refuse_apertus(config: Config) -> str | None:
    kind = config["hidden_act"]
    return None if kind == "xielu" else f"hidden_act {kind!r} (xielu is supported)"


def refuse_olmoe(config: Config) -> str | None:
    limit = config.get("clip_qkv")
    return None if limit is None else f"clip_qkv {limit} (null is supported)"


def refuse_mixed(config: Config) -> str | None:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return "layers without experts among those with them (mlp_only_layers, decoder_sparse_step)"
    return None


def refuse_hybrid(config: Config) -> str | None:
    if count := config.get("num_local_experts"):
        return f"num_local_experts {count} (0 is supported)"
    kinds = {FORMER_TYPES.get(kind, kind) for kind in config.get("layer_types") or ["linear_attention"]}
    return "layers of Mamba-2 (attention is supported)" if kinds != {"full_attention"} else None


def refuse_stablelm(config: Config) -> str | None:
    for name in ("qk_layernorm", "use_parallel_residual"):
        if config.get(name):
            return f"{name} true (false is supported)"
    return None


def refuse_bidirectional(config: Config) -> str | None:
    return "use_bidirectional_attention true" if config.get("use_bidirectional_attention") else None
