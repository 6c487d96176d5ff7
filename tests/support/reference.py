"""A transformers Llama as this project's Decoder and weights: the reference of the parity tests."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from edgeprune.model.decoder import Attention, Decoder, Layer, Mlp, Rotary

_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def decoder_of(config: LlamaConfig) -> Decoder:
    """The description of a LlamaForCausalLM with this configuration."""
    rotary = LlamaRotaryEmbedding(config)
    angles = Rotary(tuple(rotary.inv_freq.tolist()), float(rotary.attention_scaling))
    attention = Attention(config.num_attention_heads, config.num_key_value_heads, config.head_dim, angles)
    return Decoder(
        family=config.model_type,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        layers=(Layer(attention, Mlp(config.intermediate_size)),) * config.num_hidden_layers,
    )


def weights_of(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The model's weights by the names of decoder.py; a half layer that was replaced is left out."""
    weights = {"embedding": model.model.embed_tokens.weight, "norm": model.model.norm.weight}
    if not model.config.tie_word_embeddings:
        weights["head"] = model.lm_head.weight
    for index, layer in enumerate(model.model.layers):
        for kind, norm, module, names in (
            ("attention", layer.input_layernorm, layer.self_attn, _ATTENTION),
            ("mlp", layer.post_attention_layernorm, layer.mlp, _MLP),
        ):
            if not hasattr(module, next(iter(names.values()))):
                continue
            weights[f"layers.{index}.{kind}.norm"] = norm.weight
            for name, attribute in names.items():
                weights[f"layers.{index}.{kind}.{name}"] = getattr(module, attribute).weight
    return {name: weight.detach() for name, weight in weights.items()}
