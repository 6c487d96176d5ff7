"""The config.json of the model that llama.cpp computes from the metadata of a GGUF file. It knows no weights.

It is written in transformers' terms. Defaults, and what no field states, are those of llama.cpp's src/models/*.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import printable
from edgeprune.model.checkpoint.configuration import LAYER_WIDTHS, UNNAMED_WIDTHS
from edgeprune.model.checkpoint.families import FAMILIES
from edgeprune.model.gguf.file import RESTORE, Metadata
from edgeprune.model.gguf.rope import rope_of, shortest

Config = dict[str, Any]
OUTPUT_BIASES = ("attn_output.bias", "ffn_down.bias")
GELU = "gelu_pytorch_tanh"
OLMO_PERIOD = 4  # layers of an OLMo 3, the last of which has no window
EXAONE_WINDOWED = 64  # layers of the EXAONE 4 that has windows
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose scores have another scale


def config_of(metadata: Metadata, where: object) -> Config:
    """Returns the configuration of a checkpoint that is the same model. where: the file's name, for messages.

    Raises InputError for an architecture or a feature that is not supported, and for metadata that is missing.
    """
    architecture, split_count = metadata.architecture, metadata.fields.get("split.count", 1)
    if isinstance(split_count, int) and split_count > 1:
        raise InputError(f"{where} is one of {split_count} parts of a model", "Join them: llama-gguf-split --merge.")
    try:
        # The fields that all architectures share, then those of this one.
        plain = _plain(metadata)
        config = plain | _SPECIAL[architecture.name](metadata, plain)
        family = FAMILIES[config["model_type"]]
        config["architectures"] = [family.architecture]
        # Rotary positions; Gemma 3 and OLMo 3 have others in their sliding layers, GPT-2 has none.
        config["rope_parameters"] = rope_of(metadata, plain["head_dim"], where)
        if architecture.name == "gemma3":
            local = {"rope_type": "default", "rope_theta": shortest(metadata.get("rope.freq_base_swa", 10000.0))}
            config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
        if config["model_type"] == "olmo3":
            local = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
            config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
        if architecture.name == "gpt2":
            del config["rope_parameters"]
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else repr(error)
        raise InputError(f"{where} has missing or unusable metadata: {printable(reason)}", RESTORE) from None
    # Rename the fields as the family does, and drop those that it does not have.
    eps = config.pop("eps")
    activation = config.pop("activation")
    config[family.norm_eps], config[family.activation] = eps, activation
    for name, own in family.fields.items():
        config[own] = config.pop(name)
    for name in UNNAMED_WIDTHS.get(family.heads, ()):
        del config[name]
    return config


def _plain(metadata: Metadata) -> Config:
    """Returns the fields that every architecture has, by Llama's names; `eps` and `activation` are renamed later."""
    # Widths of the attention; without a field of their own, heads share the hidden size.
    heads, hidden = metadata.number("attention.head_count"), metadata.number("embedding_length")
    head_dim = int(metadata.get("attention.key_length", hidden // heads))
    if (values := int(metadata.get("attention.value_length", head_dim))) != head_dim:
        raise ValueError(f"attention.value_length {values} differs from attention.key_length {head_dim}")
    # Older files have no number of key/value heads, and one of two fields for epsilon.
    key_value_heads = metadata.get("attention.head_count_kv")
    rms = metadata.get("attention.layer_norm_rms_epsilon")
    eps = metadata.get("attention.layer_norm_epsilon", 1e-5) if rms is None else rms
    config = {
        "activation": "silu",
        "eps": shortest(eps),
        "hidden_size": hidden,
        "num_hidden_layers": metadata.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if key_value_heads is None else metadata.number("attention.head_count_kv"),
        "head_dim": head_dim,
        "intermediate_size": metadata.number("feed_forward_length"),
        "max_position_embeddings": metadata.number("context_length"),
        "vocab_size": len(metadata.fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in metadata.names,
    }
    # Special tokens.
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := metadata.fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token_id"] = int(token)
    config.setdefault("pad_token_id", None)  # some families default to one beyond a small vocabulary
    return config


def _has_biases(metadata: Metadata) -> bool:
    return _has(metadata, "attn_q.bias") or _has(metadata, "attn_qkv.bias")


def _has(metadata: Metadata, tensor: str) -> bool:
    """Returns whether layers have a tensor: the first, or where layers differ any."""
    layers = range(metadata.number("block_count") if metadata.architecture.by_layer else 1)
    return any(f"blk.{index}.{tensor}" in metadata.names for index in layers)


def _biases(metadata: Metadata) -> Config:
    return {"attention_bias": _has_biases(metadata), "mlp_bias": _has(metadata, OUTPUT_BIASES[1])}


def _llama(metadata: Metadata, plain: Config) -> Config:
    """Returns the fields of `llama`, under which llama.cpp also runs mixtral, mistral and others.

    A model that has the biases of q, k and v alone is described as qwen2.
    """
    if count := int(metadata.get("expert_count", 0)):
        experts = {"num_local_experts": count, "num_experts_per_tok": metadata.number("expert_used_count")}
        return {"model_type": "mixtral", "sliding_window": None, **experts}
    biases = _biases(metadata)
    if biases["attention_bias"] and not _has(metadata, OUTPUT_BIASES[0]):
        return {"model_type": "qwen2", "use_sliding_window": False}
    if plain["hidden_size"] % plain["num_attention_heads"] and not any(biases.values()):
        return {"model_type": "mistral", "sliding_window": None}
    return {"model_type": "llama", **biases}


def _deci(metadata: Metadata, plain: Config) -> Config:
    """Returns the fields of a Llama whose layers differ in width.

    Where a layer has no MLP, llama.cpp leaves its attention out as well; where it has query heads alone, there is one
    matrix in the place of its attention.
    """
    depth = plain["num_hidden_layers"]
    keys = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    layers = list(zip(*(metadata.numbers(key, depth) for key in keys), strict=True))
    for index, (heads, groups, channels) in enumerate(layers):
        if heads and not (groups and channels):
            what = "MLP" if groups else "key/value heads"
            raise InputError(
                f"unsupported GGUF architecture 'deci' with attention but no {what} in layer {index}",
                "Give another model.",
            )
    widths = [(groups if heads else 0, heads // groups if heads else 1, channels) for heads, groups, channels in layers]
    widest = {"num_key_value_heads": max(groups for groups, _, _ in widths)}
    widest["num_attention_heads"] = widest["num_key_value_heads"] * max(heads for _, heads, _ in widths)
    return _llama(metadata, plain | widest) | widest | {LAYER_WIDTHS: widths}


def _qwen2(metadata: Metadata, plain: Config) -> Config:
    return {"model_type": "qwen2", "use_sliding_window": False}


def _qwen3(metadata: Metadata, plain: Config) -> Config:
    return {"model_type": "qwen3", "use_sliding_window": False, "attention_bias": _has_biases(metadata)}


def _qwen3moe(metadata: Metadata, plain: Config) -> Config:
    """Returns the fields of qwen3moe; llama.cpp always normalises the weights of the chosen experts to a sum of 1."""
    count, used = metadata.number("expert_count"), metadata.number("expert_used_count")
    width = metadata.get("expert_feed_forward_length") or plain["intermediate_size"] // used
    return {
        "model_type": "qwen3_moe",
        "use_sliding_window": False,
        "attention_bias": _has_biases(metadata),
        "num_experts": count,
        "num_experts_per_tok": used,
        "norm_topk_prob": True,
        "intermediate_size": int(width),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _hunyuan(metadata: Metadata, plain: Config) -> Config:
    return {"model_type": "hunyuan_v1_dense", "attention_bias": False}


def _olmoe(metadata: Metadata, plain: Config) -> Config:
    """Returns the fields of olmoe; llama.cpp never normalises the weights of the chosen experts."""
    return {
        "model_type": "olmoe",
        "num_experts": metadata.number("expert_count"),
        "num_experts_per_tok": metadata.number("expert_used_count"),
        "norm_topk_prob": False,
    }


def _gemma(metadata: Metadata, plain: Config, window: int | None, every: int) -> Config:
    """Returns the fields that both Gemma architectures share. every: one layer in this many sees all positions.

    The scale of the scores follows from the sizes.
    """
    # The file may list the sliding layers, state their period, or leave it to the architecture.
    depth = plain["num_hidden_layers"]
    pattern = metadata.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        slides = [bool(value) for value in pattern[:depth]]
    else:
        every = int(pattern or every)
        slides = [(index + 1) % every != 0 for index in range(depth)]
    largest = depth == LARGEST_GEMMA[metadata.architecture.name]
    return {
        "activation": GELU,
        "sliding_window": window or plain["max_position_embeddings"],
        "layer_types": ["sliding_attention" if window and is_sliding else "full_attention" for is_sliding in slides],
        "query_pre_attn_scalar": plain["hidden_size"] // plain["num_attention_heads"] if largest else plain["head_dim"],
        "attention_bias": _has_biases(metadata),
    }


def _gemma2(metadata: Metadata, plain: Config) -> Config:
    return {
        "model_type": "gemma2",
        **_gemma(metadata, plain, int(metadata.get("attention.sliding_window", 4096)), 2),
        "attn_logit_softcapping": shortest(metadata.get("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": shortest(metadata.get("final_logit_softcapping", 30.0)),
        "tie_word_embeddings": True,
    }


def _gemma3(metadata: Metadata, plain: Config) -> Config:
    cap = metadata.get("final_logit_softcapping")
    return {
        "model_type": "gemma3_text",
        **_gemma(metadata, plain, metadata.get("attention.sliding_window"), 6),
        "final_logit_softcapping": shortest(cap) if cap else None,
        "attn_logit_softcapping": None,
    }


def _phi3(metadata: Metadata, plain: Config) -> Config:
    """Returns the fields of phi3.

    A window of 0 means that there is none; any other is the model's own, although llama.cpp ignores it.
    """
    config = {"model_type": "phi3", "sliding_window": int(metadata.get("attention.sliding_window") or 0) or None}
    context = plain["max_position_embeddings"]
    original = int(metadata.get("rope.scaling.original_context_length") or context)
    config["original_max_position_embeddings"] = min(original, context)
    return config


def _smollm3(metadata: Metadata, plain: Config) -> Config:
    """Returns the fields of smollm3, in which every fourth layer has no rotary positions."""
    rotates = [int((index + 1) % 4 != 0) for index in range(plain["num_hidden_layers"])]
    return {
        "model_type": "smollm3",
        "no_rope_layers": rotates,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "attention_bias": _has_biases(metadata),
        "mlp_bias": False,
    }


def _olmo2(metadata: Metadata, plain: Config) -> Config:
    """Returns the fields of olmo2; with a window it is an OLMo 3, in which every fourth layer has none."""
    biases = {"attention_bias": _has_biases(metadata)}
    if not (window := int(metadata.get("attention.sliding_window") or 0)):
        return {"model_type": "olmo2", **biases}
    slides = [(index + 1) % OLMO_PERIOD != 0 for index in range(plain["num_hidden_layers"])]
    types = ["sliding_attention" if is_sliding else "full_attention" for is_sliding in slides]
    return {"model_type": "olmo3", "sliding_window": window, "layer_types": types, **biases}


def _exaone4(metadata: Metadata, plain: Config) -> Config:
    """Returns the fields of exaone4; llama.cpp gives windows to its model of 64 layers alone."""
    if plain["num_hidden_layers"] == EXAONE_WINDOWED:
        raise InputError("unsupported GGUF architecture 'exaone4' with sliding windows", "Give another model.")
    types = ["full_attention"] * plain["num_hidden_layers"]
    return {"model_type": "exaone4", "sliding_window": None, "layer_types": types}


def _ernie(metadata: Metadata, plain: Config) -> Config:
    return {"model_type": "ernie4_5", "use_bias": _has_biases(metadata)}


def _stablelm(metadata: Metadata, plain: Config) -> Config:
    return {"model_type": "stablelm", "use_qkv_bias": _has_biases(metadata)}


def _gemma1(metadata: Metadata, plain: Config) -> Config:
    return {"model_type": "gemma", "activation": GELU, "attention_bias": False, "tie_word_embeddings": True}


def _granite(metadata: Metadata, plain: Config) -> Config:
    if metadata.get("expert_count"):
        raise InputError("unsupported GGUF architecture 'granite' with experts", "Give another model.")
    scales = {
        "attention_multiplier": ("attention.scale", plain["head_dim"] ** -0.5),
        "logits_scaling": ("logit_scale", 1.0),
        "embedding_multiplier": ("embedding_scale", 1.0),
        "residual_multiplier": ("residual_scale", 1.0),
    }
    values = {name: metadata.get(key) for name, (key, _) in scales.items()}
    multipliers = {name: shortest(value) if value else scales[name][1] for name, value in values.items()}
    return {"model_type": "granite", **multipliers, **_biases(metadata)}


def _gpt2(metadata: Metadata, plain: Config) -> Config:
    return {"model_type": "gpt2", "activation": "gelu_new", "n_ctx": plain["max_position_embeddings"]}


def _gptneox(metadata: Metadata, plain: Config) -> Config:
    rotary_share = int(metadata.get("rope.dimension_count", plain["head_dim"])) / plain["head_dim"]
    return {
        "model_type": "gpt_neox",
        "activation": "gelu",
        "rotary_pct": rotary_share,
        "attention_bias": True,
        "use_parallel_residual": bool(metadata.fields["gptneox.use_parallel_residual"]),
    }


def _starcoder2(metadata: Metadata, plain: Config) -> Config:
    return {"model_type": "starcoder2", "activation": GELU, "use_bias": True, "sliding_window": None}


_SPECIAL: dict[str, Callable[[Metadata, Config], Config]] = {
    "llama": _llama,
    "deci": _deci,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "hunyuan-dense": _hunyuan,
    "olmoe": _olmoe,
    "gemma": _gemma1,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "exaone4": _exaone4,
    "ernie4_5": _ernie,
    "stablelm": _stablelm,
    "granite": _granite,
    "gpt2": _gpt2,
    "gptneox": _gptneox,
    "starcoder2": _starcoder2,
}
