"""The files that onnxruntime-genai reads beside a graph: genai_config.json and the tokenizer's files.

With these, `onnxruntime_genai.Model(folder)` runs a folder of graph.py. It does not know the family of the model: the
model type is `decoder`, for which windows, scales, biases and positions are nodes of the graph and not settings.
Layers without attention, and key/value heads that differ from layer to layer, need onnxruntime-genai 0.18, which
reads the numbers and shapes of the KV cache from the graph.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.engine.onnx.graph import GraphVariant
from edgeprune.engine.onnx.nodes import head_width
from edgeprune.errors import InputError
from edgeprune.files import read_json, write_text
from edgeprune.model.decoder import Decoder
from edgeprune.model.tokens.generation import end_ids
from edgeprune.model.tokens.tokenizer import TOKENIZER_FILES, load_tokenizer
from edgeprune.ondevice.onnxruntime import BY_CHANNEL_BLOCKS

CONFIG, SETTINGS = "genai_config.json", "tokenizer_config.json"
FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "legacy")
LONGEST = 2**31 - 1  # tokens; transformers writes 1e30 where no length is known
VARIANTS = (GraphVariant("onnxruntime", "all"), GraphVariant("opset23", "all"), GraphVariant("primitive", "all"))
"""The graphs that onnxruntime-genai can run, the best first. With the logits of the last position alone it would read
those of padding, because it pads the shorter prompts of a batch on their right."""


@dataclass(frozen=True)
class TokenIds:
    """The special token ids of a model.

    begin: of the token that begins a text, None where the tokenizer has none; ends: of those that end a text; pad: of
    the token that fills up shorter prompts.
    """

    begin: int | None
    ends: tuple[int, ...]
    pad: int


def write_genai(
    decoder: Decoder,
    variants: Collection[GraphVariant],
    folder: Path,
    tokenizer: Path,
    max_positions: int | None = None,
) -> None:
    """Writes the files with which onnxruntime-genai loads the best graph of `variants` in a folder of write_graphs.

    tokenizer: a checkpoint's folder; max_positions: the longest sequence, as given to write_graphs. Raises InputError
    where no variant has the logits of all positions, and for a tokenizer that cannot be read. For an image generator
    nothing is written: it has no tokenizer, and onnxruntime-genai cannot run it.
    """
    if decoder.picture is not None:
        return
    variant = next((variant for variant in VARIANTS if variant in variants), None)
    if variant is None:
        raise InputError("onnxruntime-genai needs a graph with the logits of all positions", "Export model.onnx too.")
    # The configuration.
    loaded = load_tokenizer(tokenizer)
    limit = decoder.max_position_embeddings
    config = genai_config(decoder, variant, _token_ids(loaded, tokenizer), min(limit, max_positions or limit))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # The tokenizer's files; where it has no tokenizer.json, it is made from the others.
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    settings = _tokenizer_settings(tokenizer / SETTINGS, loaded, config["model"]["context_length"])
    write_text(folder / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is not None and not (tokenizer / "tokenizer.json").is_file():
        backend.save(str(folder / "tokenizer.json"))


def _tokenizer_settings(path: Path, tokenizer: Any, context: int) -> dict[str, Any]:
    """Returns tokenizer_config.json as onnxruntime-genai reads it: with nothing null, one chat template, a length.

    It refuses fields of another type than it knows, whatever transformers makes of them.
    """
    settings = {name: value for name, value in (read_json(path) if path.is_file() else {}).items() if value is not None}
    for name in FLAGS:
        if not isinstance(settings.get(name, False), bool):
            del settings[name]
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    settings.pop("chat_template", None)
    if template is not None:
        settings["chat_template"] = template
    length = settings.get("model_max_length")
    if isinstance(length, bool) or not isinstance(length, int) or not 0 < length <= LONGEST:
        settings["model_max_length"] = context
    return settings


def _token_ids(tokenizer: Any, directory: Path) -> TokenIds:
    """Returns the special token ids of a checkpoint; without a padding token, one that ends a text pads."""
    ends = tuple(sorted(end_ids(tokenizer, directory)))
    known: Sequence[int] = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, *ends) if i is not None]
    return TokenIds(tokenizer.bos_token_id, ends, known[0] if known else 0)


def genai_config(decoder: Decoder, variant: GraphVariant, tokens: TokenIds, context: int) -> dict[str, Any]:
    """Returns the content of genai_config.json for one graph; context: tokens of prompt and output together."""
    # The heads of the first attention stand for all: the shapes of the KV cache are read from the graph.
    attention = next((layer.attention for layer in decoder.layers if layer.attention), None)
    heads = attention and attention.num_attention_heads
    # The model, with the names of the graph's inputs and outputs.
    model = {
        "type": "decoder",
        "vocab_size": decoder.vocab_size,
        "context_length": context,
        "bos_token_id": tokens.begin,
        "eos_token_id": list(tokens.ends),
        "pad_token_id": tokens.pad,
        "decoder": {
            "filename": variant.filename,
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **_by_channel(decoder)},
            "hidden_size": decoder.hidden_size,
            "num_hidden_layers": len(decoder.layers),
            "num_attention_heads": heads or 0,
            "num_key_value_heads": attention.num_key_value_heads if attention else 0,
            "head_size": head_width(attention.head_dim, variant.dialect) if attention else 0,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "position_ids": "position_ids",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    # A token that the tokenizer does not have is left out. GroupQueryAttention updates the KV cache in place.
    model = {name: value for name, value in model.items() if value is not None}
    search = {"do_sample": False, "max_length": context, "past_present_share_buffer": variant.dialect == "onnxruntime"}
    return {"model": model, "search": search}


def _by_channel(decoder: Decoder) -> dict[str, str]:
    """Returns the entries of a session's options that a model needs for the products of int8 codes to be fast."""
    return dict([BY_CHANNEL_BLOCKS]) if any(form.group is None for form in decoder.weight_formats.values()) else {}
