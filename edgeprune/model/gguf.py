"""GGUF file -> standard checkpoint directory, converted once and cached by the file's sha256.

Tensors are dequantised one at a time; the tokenizer is built from the file's own metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.cache import cache_folder
from edgeprune.errors import InputError
from edgeprune.model.configuration import decoder_of
from edgeprune.model.decoder import Decoder
from edgeprune.model.gguf_file import RESTORE, GgufFile, StoredTensor, read_gguf
from edgeprune.model.save import write_weights
from edgeprune.model.tokenizer import write_tokenizer

if TYPE_CHECKING:
    import torch

FORMAT = 3  # of the converted directory; a new one converts again
OUTER = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
LAYER = {
    "attention.norm": "attn_norm", "attention.q": "attn_q", "attention.k": "attn_k", "attention.v": "attn_v",
    "attention.o": "attn_output", "mlp.norm": "ffn_norm", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}  # fmt: skip
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FREQUENCIES = "rope_freqs.weight"


def converted(path: Path) -> Path:
    """The directory with the file's checkpoint, tokenizer and configuration.

    Raises InputError for a file that is broken or not supported, or a cache that cannot be written.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{digest[:32]}-{FORMAT}"
    if folder.is_dir():
        return folder
    source = read_gguf(path)
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _convert(source, path, part)
        _publish(part, folder)
    except OSError as error:
        raise InputError(
            f"cannot convert {path.name} into {folder.parent}: {error.strerror or error}",
            "Free some space there, or set EDGEPRUNE_CACHE to another folder.",
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def decoder_of_gguf(path: Path) -> Decoder:
    """The architecture that a file's metadata describes; nothing is converted. Raises InputError."""
    return decoder_of(_config(read_gguf(path), path))


def _publish(part: Path, folder: Path) -> None:
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise


def _convert(source: GgufFile, path: Path, folder: Path) -> None:
    config = _config(source, path)
    decoder = decoder_of(config)
    names, shapes = _gguf_names(decoder), decoder.shapes()
    for name, shape in shapes.items():
        found = source.tensors.get(names[name])
        if found is None or found.shape != shape:
            raise InputError(f"{path} has no tensor {names[name]} of shape {shape}", RESTORE)
    if unknown := source.tensors.keys() - names.values() - {FREQUENCIES}:
        raise InputError(
            f"{path} has the tensor {min(unknown)}, which a dense llama model without biases has not",
            "Supported are dense llama and mistral models without biases.",
        )
    dtype = _dtype([source.tensors[names[name]] for name in shapes])
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_tokenizer(source.fields, config["max_position_embeddings"], folder)
    write_weights(decoder, _weights(decoder, names, source), folder, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation = json.dumps(_generation(source.fields, config), indent=2, sort_keys=True) + "\n"
    (folder / "generation_config.json").write_text(generation, encoding="utf-8")


def _generation(fields: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Special tokens; a chat model may end its turn with another token than its text."""
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    turn = fields.get("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = [*([ids["eos_token_id"]] if "eos_token_id" in ids else []), int(turn)]
    return ids


def _gguf_names(decoder: Decoder) -> dict[str, str]:
    names = {}
    for name in decoder.shapes():
        if name.startswith("layers."):
            _, index, part = name.split(".", 2)
            names[name] = f"blk.{index}.{LAYER[part]}.weight"
        else:
            names[name] = f"{OUTER[name]}.weight"
    return names


def _config(source: GgufFile, path: Path) -> dict[str, Any]:
    fields = source.fields
    if (architecture := fields.get("general.architecture")) != "llama":
        raise InputError(
            f"unsupported GGUF architecture {architecture!r}", "Supported is: llama (Mistral's files say llama too)."
        )
    try:
        heads = int(fields["llama.attention.head_count"])
        hidden = int(fields["llama.embedding_length"])
        head_dim = int(fields.get("llama.attention.key_length", hidden // heads))
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": hidden,
            "num_hidden_layers": int(fields["llama.block_count"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", heads)),
            "head_dim": head_dim,
            "intermediate_size": int(fields["llama.feed_forward_length"]),
            "max_position_embeddings": int(fields["llama.context_length"]),
            "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
            "vocab_size": len(fields["tokenizer.ggml.tokens"]),
            "tie_word_embeddings": "output.weight" not in source.tensors,
            "attention_bias": False,
            "mlp_bias": False,
        }
        config["rope_parameters"] = _rope(source, head_dim)
        rotated = int(fields.get("llama.rope.dimension_count", head_dim))
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            if (token := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
                config[f"{name}_token_id"] = int(token)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{path} lacks metadata: {error!r}", RESTORE) from None
    if rotated != head_dim:
        raise InputError(f"{path} rotates {rotated} of {head_dim} head dimensions", "Supported is: all of them.")
    return config


def _shortest(value: float) -> float:
    """The decimal that was meant: GGUF holds fp32, so 1e-5 comes back as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope(source: GgufFile, head_dim: int) -> dict[str, Any]:
    theta = _shortest(source.fields.get("llama.rope.freq_base", 10000.0))
    if (stored := source.tensors.get(FREQUENCIES)) is not None:
        factors = stored.values()
        scaling = {"rope_type": "llama3", "factor": float(np.max(factors)), **LLAMA3}
        known = factors.shape == (head_dim // 2,)
        if not known or not np.allclose(_llama3_factors(theta, head_dim, scaling), factors, rtol=1e-3):
            raise InputError("unsupported rope factors in the GGUF file", "Give the original Hugging Face directory.")
        return {"rope_theta": theta, **scaling}
    # as llama.cpp reads them: no type means linear, no factor means 1; files of 2023 say scale_linear
    kind = source.fields.get("llama.rope.scaling.type", "linear")
    factor = source.fields.get("llama.rope.scaling.factor", source.fields.get("llama.rope.scale_linear")) or 1.0
    if kind == "linear" and factor != 1.0:
        return {"rope_theta": theta, "rope_type": kind, "factor": _shortest(factor)}
    if kind not in ("linear", "none"):
        raise InputError(f"unsupported rope scaling {kind!r}", "Supported are: linear, llama3.")
    return {"rope_theta": theta, "rope_type": "default"}


def _llama3_factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """What each frequency is divided by in Llama 3's scaling (head_dim / 2,)."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, original = (scaling[name] for name in LLAMA3)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _dtype(tensors: list[StoredTensor]) -> torch.dtype:
    """The type of the matrices where all have the same plain one, else fp32; norms are fp32 in every file."""
    import torch

    types = {tensor.type.name for tensor in tensors if len(tensor.shape) == 2}
    return getattr(torch, PLAIN.get(types.pop(), "float32")) if len(types) == 1 else torch.float32


def _weights(decoder: Decoder, names: dict[str, str], source: GgufFile) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    attention = decoder.layers[0].attention
    heads = {"attention.q": attention.num_attention_heads, "attention.k": attention.num_key_value_heads}
    for name, shape in decoder.shapes().items():
        values = source.tensors[names[name]].values()
        if (count := heads.get(name.split(".", 2)[-1])) is not None:
            # llama.cpp's converter interleaves the two halves of each head's rotary pairs
            values = values.reshape(count, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        yield name, torch.from_numpy(np.require(values, np.float32, ["C", "W"]))
