"""The places of the weights of decoder.py in a GGUF file: llama.cpp's names, with an entry for each architecture.

Matrices are (out_features, in_features), as in decoder.py. Norms are stored as the factors that they multiply by;
experts are stacked in one tensor of three dimensions. The facts are those of llama.cpp: src/models/*.cpp shows which
tensors it loads and what it computes. It knows no values.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from edgeprune.model.checkpoint.names import FUSED_QKV, FUSED_QKV_BIAS
from edgeprune.model.checkpoint.places import Place, Places
from edgeprune.model.decoder import Decoder

OUTER = {
    "embedding": "token_embd.weight",
    "positions": "position_embd.weight",
    "norm": "output_norm.weight",
    "norm_bias": "output_norm.bias",
    "head": "output.weight",
}
LAYER = {
    "attention.norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention.post_norm": "post_attention_norm",
    "mlp.norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "mlp.post_norm": "post_ffw_norm",
    "mlp.router": "ffn_gate_inp",
}
EXPERTS = {f"mlp.experts.{part}": f"blk.{{i}}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")}
QKV, FUSED_UP = "attn_qkv", ("mlp.gate", "mlp.up")
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FREQUENCIES, LONG, SHORT)
INPUT_BIASES = frozenset(f"attention.{part}_bias" for part in ("q", "k", "v"))
LAYER_BIASES = INPUT_BIASES | {"attention.o_bias", "mlp.gate_bias", "mlp.up_bias", "mlp.down_bias"}


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp, by its `general.architecture`, and what it supports.

    interleaved: q and k store the two halves of every rotary pair side by side. fused_qkv: llama.cpp's converter stores
    q, k and v in one tensor; it loads either form. fused_up: gate and up are one tensor. biases: the biases of matrices
    that it loads. whole: the query heads must fill hidden_size. partial: it may rotate a part of a head only. windows:
    it applies sliding windows; otherwise every query sees all positions before it. head: it needs an output matrix that
    is not tied to the embedding. frequencies: the tensors of rope factors that it applies.
    by_layer: heads and MLP channels may differ from layer to layer, and a layer may have no attention.
    """

    name: str
    interleaved: bool = False
    fused_qkv: bool = False
    fused_up: bool = False
    biases: frozenset[str] = INPUT_BIASES
    whole: bool = False
    partial: bool = False
    windows: bool = False
    head: bool = False
    frequencies: tuple[str, ...] = ()
    by_layer: bool = False


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", interleaved=True, biases=LAYER_BIASES, frequencies=ROPE_TENSORS),
        Architecture("deci", interleaved=True, biases=LAYER_BIASES, frequencies=(FREQUENCIES,), by_layer=True),
        Architecture("qwen2", whole=True),
        Architecture("qwen3"),
        Architecture("qwen3moe"),
        Architecture("hunyuan-dense", biases=frozenset()),
        Architecture("olmoe", biases=frozenset(), whole=True, head=True),
        Architecture("gemma", biases=frozenset()),
        Architecture("gemma2", windows=True),
        Architecture("gemma3", windows=True),
        Architecture(
            "phi3",
            fused_qkv=True,
            fused_up=True,
            biases=frozenset(),
            whole=True,
            partial=True,
            frequencies=(LONG, SHORT),
        ),
        Architecture("smollm3", interleaved=True),
        Architecture("olmo2", whole=True, windows=True, head=True),
        Architecture("exaone4", biases=frozenset(), whole=True, frequencies=(FREQUENCIES,)),
        Architecture("ernie4_5", interleaved=True),
        Architecture("stablelm", whole=True, partial=True, head=True),
        Architecture("granite", interleaved=True, biases=LAYER_BIASES, frequencies=(FREQUENCIES,)),
        Architecture("gpt2", fused_qkv=True, biases=LAYER_BIASES, whole=True),
        Architecture("gptneox", fused_qkv=True, biases=LAYER_BIASES, whole=True, partial=True, head=True),
        Architecture("starcoder2", biases=LAYER_BIASES, whole=True),
    )
}
# Parts of names, as llama.cpp's converter decides.
ALWAYS_FP32 = ("norm", "bias", "ffn_gate_inp", "position_embd", "rope_f")


def places_of(architecture: Architecture, decoder: Decoder, fused_qkv: bool) -> Places:
    """Returns the place in the file of every weight that a decoder may have, by the weight's name without its layer."""
    # One tensor for each weight.
    places = {name: Place(key) for name, key in OUTER.items()}
    for name, key in LAYER.items():
        places[name] = Place(f"blk.{{i}}.{key}.weight")
        places[f"{name}_bias"] = Place(f"blk.{{i}}.{key}.bias")
    # Tensors that hold several weights: q, k and v; gate and up; the experts of a layer.
    if fused_qkv:
        places |= {name: Place(f"blk.{{i}}.{QKV}.weight", FUSED_QKV) for name in FUSED_QKV}
        places |= {name: Place(f"blk.{{i}}.{QKV}.bias", FUSED_QKV_BIAS) for name in FUSED_QKV_BIAS}
    if architecture.fused_up:
        places |= {name: Place("blk.{i}.ffn_up.weight", FUSED_UP) for name in FUSED_UP}
    mlp = next((layer.mlp for layer in decoder.layers if layer.mlp), None)
    if mlp is not None and mlp.experts is not None:
        for name, key in EXPERTS.items():
            part = name.rsplit(".", 1)[-1]
            places[name] = Place(key, tuple(f"mlp.experts.{e}.{part}" for e in range(mlp.experts.num_experts)))
    return places


def has_fused_qkv(names: Collection[str]) -> bool:
    return f"blk.0.{QKV}.weight" in names


def is_always_fp32(name: str) -> bool:
    return any(part in name for part in ALWAYS_FP32)
