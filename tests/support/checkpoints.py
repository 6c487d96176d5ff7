"""Small checkpoints on disk, with a tokenizer of their own, for tests that go through files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from edgeprune.model.checkpoint.configuration import LAYER_WIDTHS
from tests.support.tiny import llama

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|end|>"]


def save_tokenizer(folder: Path) -> None:
    """Byte-level, no merges: 257 tokens."""
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(SPECIAL + LETTERS)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>").save_pretrained(
        folder
    )


def save_llama(folder: Path, dtype: torch.dtype = torch.float32, **changes: object):
    """A random Llama of 257 tokens and head_dim 16 with its tokenizer; returns the model."""
    settings = {
        "vocab_size": 257,
        "hidden_size": 96,
        "head_dim": 16,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
    }
    shard = changes.pop("max_shard_size", "5GB")
    model = llama(**(settings | changes)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return model


def save_uneven(source: Path, folder: Path) -> None:
    """The checkpoint of a Llama whose second layer has lost its attention, made of a whole one's folder."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    widths = [[groups, heads // groups, config["intermediate_size"]]] * config["num_hidden_layers"]
    widths[1] = [0, 1, config["intermediate_size"]]
    (folder / "config.json").write_text(json.dumps(config | {LAYER_WIDTHS: widths}))
    gone = ("model.layers.1.self_attn.", "model.layers.1.input_layernorm.")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}, folder / "model.safetensors"
    )
