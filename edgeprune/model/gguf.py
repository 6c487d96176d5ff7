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
from edgeprune.model.decoder import Decoder
from edgeprune.model.families import checkpoint_names, decoder_of
from edgeprune.model.save import write_tensors
from edgeprune.model.tokenizer import write_tokenizer

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor

FORMAT = 1  # of the converted directory; a new one converts again
OUTER = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
LAYER = {
    "attention.norm": "attn_norm", "attention.q": "attn_q", "attention.k": "attn_k", "attention.v": "attn_v",
    "attention.o": "attn_output", "mlp.norm": "ffn_norm", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}  # fmt: skip
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
RESTORE = "Download the file again, or give the original Hugging Face directory."


def converted(path: Path) -> Path:
    """The directory with the file's checkpoint, tokenizer and configuration. Raises InputError."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is no GGUF file", RESTORE)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{digest[:32]}-{FORMAT}"
    if folder.is_dir():
        return folder
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _convert(path, part)
        if not folder.is_dir():  # another process may have been faster
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _convert(path: Path, folder: Path) -> None:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader meets a cut or altered file with errors of many kinds
        raise InputError(f"{path} cannot be read: {error}", RESTORE) from None
    config = _config(fields, reader, path)
    decoder = decoder_of(config)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = _gguf_names(decoder)
    shapes = decoder.shapes()
    for name, shape in shapes.items():
        found = tensors.get(names[name])
        if found is None or tuple(int(size) for size in reversed(found.shape)) != shape:
            raise InputError(f"{path} has no tensor {names[name]} of shape {shape}", RESTORE)
    dtype = _dtype(tensors[names[name]] for name in shapes)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_tensors(
        checkpoint_names(decoder), shapes, _weights(decoder, names, tensors, path), folder, dtype
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(fields, config["max_position_embeddings"], folder)


def _gguf_names(decoder: Decoder) -> dict[str, str]:
    names = {}
    for name in decoder.shapes():
        if name.startswith("layers."):
            _, index, part = name.split(".", 2)
            names[name] = f"blk.{index}.{LAYER[part]}.weight"
        else:
            names[name] = f"{OUTER[name]}.weight"
    return names


def _config(fields: dict[str, Any], reader: GGUFReader, path: Path) -> dict[str, Any]:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"unsupported GGUF architecture {architecture!r}", "Supported is: llama (and Mistral, as llama).")
    names = {tensor.name for tensor in reader.tensors}
    if "blk.0.ffn_gate_inp.weight" in names:
        raise InputError("unsupported GGUF architecture: mixture of experts", "Supported are dense llama models.")
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
            # stored as fp32: 1e-5 comes back as 9.999999747378752e-06
            "rms_norm_eps": float(np.format_float_positional(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
            "vocab_size": len(fields["tokenizer.ggml.tokens"]),
            "tie_word_embeddings": "output.weight" not in names,
            "attention_bias": False,
            "mlp_bias": False,
        }
        theta = float(fields.get("llama.rope.freq_base", 10000.0))
        rotated = int(fields.get("llama.rope.dimension_count", head_dim))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} lacks metadata: {error!r}", RESTORE) from None
    if rotated != head_dim:
        raise InputError(f"{path} rotates {rotated} of {head_dim} head dimensions", "Supported is: all of them.")
    for name in ("bos", "eos", "padding"):
        if (token := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{'pad' if name == 'padding' else name}_token_id"] = int(token)
    config["rope_parameters"] = {"rope_theta": theta} | _rope_scaling(fields, reader, theta, head_dim)
    return config


def _rope_scaling(fields: dict[str, Any], reader: GGUFReader, theta: float, head_dim: int) -> dict[str, Any]:
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is not None:
        scaling = {"rope_type": "llama3", "factor": float(np.max(factors)), **LLAMA3}
        if not np.allclose(_llama3_factors(theta, head_dim, scaling), factors, rtol=1e-3):
            raise InputError("unsupported rope factors in the GGUF file", "Give the original Hugging Face directory.")
        return scaling
    kind = fields.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(fields["llama.rope.scaling.factor"])}
    if kind != "none":
        raise InputError(f"unsupported rope scaling {kind!r}", "Supported are: linear, llama3.")
    return {"rope_type": "default"}


def _llama3_factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """What each frequency is divided by in Llama 3's scaling (head_dim / 2,)."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, original = (scaling[name] for name in LLAMA3)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _dtype(tensors: Iterator[ReaderTensor]) -> torch.dtype:
    """fp32 where anything is quantised, else the type of the first matrix."""
    import torch

    types = [tensor.tensor_type.name for tensor in tensors]
    return torch.float32 if set(types) - set(PLAIN) else getattr(torch, PLAIN[types[0]])


def _weights(
    decoder: Decoder, names: dict[str, str], tensors: dict[str, ReaderTensor], path: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    import torch
    from gguf.quants import dequantize

    attention = decoder.layers[0].attention
    heads = {"attention.q": attention.num_attention_heads, "attention.k": attention.num_key_value_heads}
    for name, shape in decoder.shapes().items():
        tensor = tensors[names[name]]
        try:
            values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        except (NotImplementedError, ValueError) as error:
            raise InputError(
                f"{path}: tensor {tensor.name} of type {tensor.tensor_type.name} cannot be dequantised: {error}", RESTORE
            ) from None
        part = name.split(".", 2)[-1]
        if part in heads:  # GGUF interleaves the two halves of each head's rotary pairs
            count = heads[part]
            values = values.reshape(count, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        yield name, torch.from_numpy(np.array(values, dtype=np.float32))
