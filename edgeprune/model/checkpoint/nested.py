"""The text part of a configuration of pictures or sounds and text, in which it is nested. It knows no weights."""

from __future__ import annotations

from typing import Any

from edgeprune.model.checkpoint.families import FAMILIES

Config = dict[str, Any]

TEXT_PARTS = ("text_config", "llm_config", "language_config")
SAME_TEXT = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text parts that are another family: their rotary embedding has axes for time, height and width, which text does not
tell apart."""
FLAT = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2"}  # older configurations have the text's fields outside
AXES = ("mrope_section", "mrope_interleaved")
MERGED = ("idefics3", "llava", "mistral3", "smolvlm")
"""Wholes for whose text part an image is nothing but embeddings in the place of tokens: positions have one axis,
attention is causal among them too, and no later layer reads the image again."""
OTHERS = ("vision_config", "audio_config", "architectures", "auto_map")  # fields that are not of the text part
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
SIZES = {
    family: dict(zip(NAMES, sizes, strict=True))
    for family, sizes in {
        "llama": (4096, 11008, 32, 32, 32000),
        "mistral": (4096, 14336, 32, 32, 32000),
        "qwen2": (4096, 22016, 32, 32, 151936),
        "qwen3": (4096, 22016, 32, 32, 151936),
        "ministral3": (4096, 14336, 34, 32, 131072),
        "gemma": (3072, 24576, 28, 16, 256000),
        "gemma2": (2304, 9216, 26, 8, 256000),
        "gemma3_text": (2304, 9216, 26, 8, 262208),
        "phi3": (3072, 8192, 32, 32, 32064),
        "smollm3": (2048, 11008, 36, 16, 128256),
    }.items()
}
"""transformers' defaults: it leaves them out of a nested configuration, though never of a whole one."""


def text_part(config: Config) -> Config:
    """Returns the configuration of the text part where one of a supported family is nested, otherwise the whole."""
    if (nested := _nested(config)) is None:
        return config
    tied = {name: config[name] for name in ("tie_word_embeddings",) if name in config}  # the whole's decides
    return {name: value for name, value in nested.items() if name != "architectures"} | _left_out(nested) | tied


def defaults_taken(config: Config) -> str:
    """Returns the sizes that a nested text part leaves to transformers' defaults, in words; empty where none."""
    return ", ".join(f"{name} {size}" for name, size in _left_out(_nested(config) or {}).items())


def _nested(config: Config) -> Config | None:
    whole = str(config.get("model_type"))
    nested = next((config[name] for name in TEXT_PARTS if isinstance(config.get(name), dict)), {})
    if not nested and whole in FLAT:
        nested = {name: value for name, value in config.items() if name not in OTHERS} | {"model_type": FLAT[whole]}
    family = str(nested.get("model_type"))
    if SAME_TEXT.get(family, family) not in FAMILIES or whole in FAMILIES:
        return None
    is_of_axes = family in SAME_TEXT or whole in FLAT
    return _of_one_axis(nested | {"model_type": SAME_TEXT.get(family, family)}) if is_of_axes else nested


def _of_one_axis(nested: Config) -> Config:
    """Returns a text part whose rotary embedding has one axis, which is the same for text."""
    plain = dict(nested)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(parameters := nested.get(name), dict):
            kind = parameters.get("rope_type") or parameters.get("type")
            plain[name] = {key: value for key, value in parameters.items() if key not in AXES}
            if kind == "mrope":
                plain[name] = {key: value for key, value in plain[name].items() if key != "type"} | {
                    "rope_type": "default"
                }
    return plain


def _left_out(nested: Config) -> Config:
    sizes = SIZES.get(str(nested.get("model_type")), {})
    return {name: size for name, size in sizes.items() if nested.get(name) is None}
