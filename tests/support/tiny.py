"""A small random Llama as a Model in memory: what pruning and evaluation are tested on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgeprune.model.decoder import Decoder
from edgeprune.model.model import Model
from tests.support.reference import decoder_of, weights_of


def config(**changes: object) -> LlamaConfig:
    """2 layers, hidden 48, 6 query heads in 2 groups of head_dim 8, 64 channels, vocabulary 101."""
    settings = {
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**(settings | changes))


def llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(**changes)).eval()


def as_model(reference: LlamaForCausalLM) -> Model:
    return Model("tiny", Path(), decoder_of(reference.config), weights_of(reference), "tiny")


def rebuilt(target: Decoder, weights: dict[str, torch.Tensor], base: LlamaForCausalLM) -> LlamaForCausalLM:
    """transformers' own model with the pruned widths and weights; raises if a name or shape is off."""
    layer = target.layers[0]
    settings = base.config.to_dict() | {
        "num_attention_heads": layer.attention.num_attention_heads,
        "head_dim": layer.attention.head_dim,
        "num_key_value_heads": layer.attention.num_key_value_heads,
        "intermediate_size": layer.mlp.intermediate_size,
    }
    settings.pop("model_type")
    from transformers import MistralConfig, MistralForCausalLM

    settings["architectures"] = None
    model = MistralForCausalLM(MistralConfig(**settings, sliding_window=None)).eval()
    own = weights_of(model)
    assert {name: tuple(w.shape) for name, w in own.items()} == {n: tuple(w.shape) for n, w in weights.items()}
    for name, weight in own.items():
        weight.copy_(weights[name])
    return model
