"""The names of every family's tensors: one table per family from decoder.py's weights to places in a checkpoint.

It does not know how the tensors are read.
"""

from __future__ import annotations

from dataclasses import replace

from edgeprune.model.checkpoint.places import Place, Places
from edgeprune.model.decoder import XIELU


def _under(outer: str, layer: str, table: dict[str, Place], **others: Place) -> Places:
    """Returns a family's table: the places of a layer below the layer's prefix, and those outside the layers.

    outer: prefix of embedding and final norm; layer: prefix of a layer; others: places that replace or extend the rest.
    """
    inside = {name: replace(place, key=f"{layer}.{place.key}") for name, place in table.items()}
    outside = {
        "embedding": Place(f"{outer}.embed_tokens.weight"),
        "norm": Place(f"{outer}.norm.weight"),
        "norm_bias": Place(f"{outer}.norm.bias"),
        "head": Place("lm_head.weight"),
    }
    return outside | inside | others


def _projections(kind: str, module: str, **names: str) -> dict[str, Place]:
    """Returns the places of weights and biases of some matrices. names: `q="q_proj"` and so on.

    kind: `attention` or `mlp`; module: its name in the checkpoint.
    """
    places = {}
    for part, name in names.items():
        places[f"{kind}.{part}"] = Place(f"{module}.{name}.weight")
        places[f"{kind}.{part}_bias"] = Place(f"{module}.{name}.bias")
    return places


def _norms(shift: float = 0.0, **names: str) -> dict[str, Place]:
    """Returns the places of norms, with the biases that a LayerNorm has.

    names: `attention_norm="input_layernorm"` and so on. shift: what is added to the stored weights.
    """
    places = {}
    for part, name in names.items():
        kind, norm = part.split("_", 1)
        places[f"{kind}.{norm}"] = Place(f"{name}.weight", shift=shift)
        places[f"{kind}.{norm}_bias"] = Place(f"{name}.bias")
    return places


ATTENTION = _projections("attention", "self_attn", q="q_proj", k="k_proj", v="v_proj", o="o_proj")
MLP = _projections("mlp", "mlp", gate="gate_proj", up="up_proj", down="down_proj")
TWO_NORMS = _norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
QK_NORMS = {f"attention.{part}_norm": Place(f"self_attn.{part}_norm.weight") for part in ("q", "k")}
LLAMA_LAYER = TWO_NORMS | ATTENTION | MLP
LLAMA = _under("model", "model.layers.{i}", LLAMA_LAYER)
QWEN3 = _under("model", "model.layers.{i}", LLAMA_LAYER | QK_NORMS)
HUNYUAN = _under(
    "model",
    "model.layers.{i}",
    LLAMA_LAYER
    | {
        f"attention.{part}_norm": Place(f"self_attn.{name}_layernorm.weight")
        for part, name in (("q", "query"), ("k", "key"))
    },
)
APERTUS = _under(
    "model",
    "model.layers.{i}",
    ATTENTION
    | MLP
    | QK_NORMS
    | _norms(attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm")
    | {f"mlp.{name}": Place(f"mlp.act_fn.{name}") for name in XIELU},
)
QWEN3_MOE = _under(
    "model",
    "model.layers.{i}",
    TWO_NORMS
    | ATTENTION
    | QK_NORMS
    | {
        "mlp.router": Place("mlp.gate.weight"),
        **{f"mlp.experts.{part}": Place(f"mlp.experts.{{e}}.{part}_proj.weight") for part in ("gate", "up", "down")},
    },
)
MIXTRAL = _under(
    "model",
    "model.layers.{i}",
    TWO_NORMS
    | ATTENTION
    | {
        "mlp.router": Place("block_sparse_moe.gate.weight"),
        **{
            f"mlp.experts.{part}": Place(f"block_sparse_moe.experts.{{e}}.{name}.weight")
            for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        },
    },
)
GPT_OSS = _under(
    "model",
    "model.layers.{i}",
    TWO_NORMS
    | ATTENTION
    | {
        "attention.sinks": Place("self_attn.sinks"),
        "mlp.router": Place("mlp.router.weight"),
        "mlp.router_bias": Place("mlp.router.bias"),
    }
    | {
        f"mlp.experts.{part}{end}": Place(f"mlp.experts.{name}{end}", held, transposed=not end, stacked=True)
        for end in ("", "_bias")
        for name, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",)))
        for held in [tuple(f"mlp.experts.{part}{end}" for part in parts)]
        for part in parts
    },
)
GEMMA = _under(
    "model",
    "model.layers.{i}",
    ATTENTION | MLP | _norms(1.0, attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    norm=Place("model.norm.weight", shift=1.0),
)
GEMMA2 = _under(
    "model",
    "model.layers.{i}",
    ATTENTION
    | MLP
    | _norms(
        1.0,
        attention_norm="input_layernorm",
        attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    ),
    norm=Place("model.norm.weight", shift=1.0),
)
GEMMA3 = dict(GEMMA2) | {
    f"attention.{part}_norm": Place(f"model.layers.{{i}}.self_attn.{part}_norm.weight", shift=1.0)
    for part in ("q", "k")
}
OLMO2 = _under(
    "model",
    "model.layers.{i}",
    ATTENTION
    | MLP
    | QK_NORMS
    | _norms(attention_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm"),
)
FUSED_QKV = ("attention.q", "attention.k", "attention.v")
FUSED_QKV_BIAS = tuple(f"{name}_bias" for name in FUSED_QKV)
PHI3 = _under(
    "model",
    "model.layers.{i}",
    LLAMA_LAYER
    | {
        **{name: Place("self_attn.qkv_proj.weight", FUSED_QKV) for name in FUSED_QKV},
        **{name: Place("mlp.gate_up_proj.weight", ("mlp.gate", "mlp.up")) for name in ("mlp.gate", "mlp.up")},
    },
)
ERNIE = _under(
    "model",
    "model.layers.{i}",
    LLAMA_LAYER
    | {
        f"attention.{part}{end}": replace(ATTENTION[f"attention.{part}{end}"], neighbours=True)
        for part in ("q", "k")
        for end in ("", "_bias")
    },
)
GRANITE_HYBRID = _under(
    "model",
    "model.layers.{i}",
    TWO_NORMS
    | ATTENTION
    | {name: Place("shared_mlp.input_linear.weight", ("mlp.gate", "mlp.up")) for name in ("mlp.gate", "mlp.up")}
    | {"mlp.down": Place("shared_mlp.output_linear.weight")},
)
STARCODER2 = _under(
    "model", "model.layers.{i}", TWO_NORMS | ATTENTION | _projections("mlp", "mlp", up="c_fc", down="c_proj")
)
OPT = _under(
    "model.decoder",
    "model.decoder.layers.{i}",
    _norms(attention_norm="self_attn_layer_norm", mlp_norm="final_layer_norm")
    | _projections("attention", "self_attn", q="q_proj", k="k_proj", v="v_proj", o="out_proj")
    | {
        f"mlp.{part}{end}": Place(f"{name}.{kind}")
        for part, name in (("up", "fc1"), ("down", "fc2"))
        for end, kind in (("", "weight"), ("_bias", "bias"))
    },
    positions=Place("model.decoder.embed_positions.weight", skip=2),
    norm=Place("model.decoder.final_layer_norm.weight"),
    norm_bias=Place("model.decoder.final_layer_norm.bias"),
)
GPT_NEOX = _under(
    "gpt_neox",
    "gpt_neox.layers.{i}",
    TWO_NORMS
    | _projections("attention", "attention", o="dense")
    | _projections("mlp", "mlp", up="dense_h_to_4h", down="dense_4h_to_h")
    | {name: Place("attention.query_key_value.weight", FUSED_QKV, by_head=True) for name in FUSED_QKV}
    | {name: Place("attention.query_key_value.bias", FUSED_QKV_BIAS, by_head=True) for name in FUSED_QKV_BIAS},
    embedding=Place("gpt_neox.embed_in.weight"),
    head=Place("embed_out.weight"),
    norm=Place("gpt_neox.final_layer_norm.weight"),
    norm_bias=Place("gpt_neox.final_layer_norm.bias"),
)
GPT2 = _under(
    "transformer",
    "transformer.h.{i}",
    _norms(attention_norm="ln_1", mlp_norm="ln_2")
    | {name: Place("attn.c_attn.weight", FUSED_QKV, transposed=True) for name in FUSED_QKV}
    | {name: Place("attn.c_attn.bias", FUSED_QKV_BIAS) for name in FUSED_QKV_BIAS}
    | {
        f"{part}{end}": Place(f"{name}.{kind}", transposed=not end)
        for part, name in (("attention.o", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj"))
        for end, kind in (("", "weight"), ("_bias", "bias"))
    },
    embedding=Place("transformer.wte.weight"),
    positions=Place("transformer.wpe.weight"),
    norm=Place("transformer.ln_f.weight"),
    norm_bias=Place("transformer.ln_f.bias"),
)
LLAMAGEN = {
    "embedding": Place("tok_embeddings.weight", inputs="cls_embedding.embedding_table.weight"),
    "norm": Place("norm.weight"),
    "head": Place("output.weight"),
    **{
        f"{kind}.norm": Place(f"layers.{{i}}.{name}_norm.weight")
        for kind, name in (("attention", "attention"), ("mlp", "ffn"))
    },
    **{name: Place("layers.{i}.attention.wqkv.weight", FUSED_QKV, neighbours=True) for name in FUSED_QKV},
    "attention.o": Place("layers.{i}.attention.wo.weight"),
    **{
        f"mlp.{part}": Place(f"layers.{{i}}.feed_forward.{name}.weight")
        for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    },
}
