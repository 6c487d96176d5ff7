"""The supported families of checkpoints: one short mapping per family onto decoder.py.

A family has the differences of its configuration from a plain Llama's (adapt.py), and the places of its weights
(places.py). The rest of the program knows only the Decoder. docs/families.md shows how to add a family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from edgeprune.model.checkpoint import adapt, names
from edgeprune.model.checkpoint.adapt import Config
from edgeprune.model.checkpoint.places import Places
from edgeprune.model.decoder import Decoder


@dataclass(frozen=True)
class Family:
    """A family: its model_type, its class in transformers, and its differences from a plain Llama.

    adapt: makes this family's Decoder from that of a plain Llama with the configuration's widths and rotary embedding.
    defaults: the values that transformers uses for fields that config.json leaves out. fields: this family's names for
    some of Llama's fields. activation, norm_eps: the fields with these; no activation where `adapt` knows it. heads:
    which numbers of heads a configuration can have: any (`free`), one that divides hidden_size (`divide`), only
    hidden_size over head_dim (`whole`), each of which has keys and values of its own (`fixed`). plain: further fields
    in Llama's words, where more than a name differs. by_layer: the fields with one value for each layer that a
    configuration always has. rotates_part: it reads partial_rotary_factor. refuse: returns why a configuration, with
    its defaults, cannot be handled, or None.
    """

    model_type: str
    architecture: str
    places: Places
    adapt: Callable[[Decoder, Config], Decoder]
    defaults: Config = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    activation: str = "hidden_act"
    norm_eps: str = "rms_norm_eps"
    heads: Literal["free", "divide", "whole", "fixed"] = "free"
    plain: Callable[[Config], Config] = lambda config: {}
    by_layer: tuple[str, ...] = ()
    rotates_part: bool = False
    refuse: Callable[[Config], str | None] = lambda config: None


GRANITE_SCALES = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
MINISTRAL_ROPE = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "max_position_embeddings": 262144,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
CONTEXT = {"max_position_embeddings": 2048}
GPT2_FIELDS = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "intermediate_size": "n_inner",
}
GPT2_DEFAULTS = {
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "layer_norm_epsilon": 1e-5,
}

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", names.LLAMA, adapt.biases, CONTEXT, heads="divide"),
        Family(
            "mistral",
            "MistralForCausalLM",
            names.LLAMA,
            adapt.all_slide,
            {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            names.LLAMA,
            adapt.qwen2,
            {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            names.QWEN3,
            adapt.qwen3,
            {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
        ),
        Family(
            "gemma",
            "GemmaForCausalLM",
            names.GEMMA,
            adapt.gemma,
            {
                "max_position_embeddings": 8192,
                "num_key_value_heads": 16,
                "head_dim": 256,
                "hidden_act": "gelu_pytorch_tanh",
                "tie_word_embeddings": True,
            },
            refuse=adapt.refuse_bidirectional,
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            names.GEMMA2,
            adapt.gemma2,
            {
                "max_position_embeddings": 8192,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "sliding_window": 4096,
                "query_pre_attn_scalar": 256,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "tie_word_embeddings": True,
                "hidden_activation": "gelu_pytorch_tanh",
            },
            activation="hidden_activation",
            heads="divide",
            refuse=adapt.refuse_bidirectional,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            names.GEMMA3,
            adapt.gemma3,
            {
                "max_position_embeddings": 131072,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "sliding_window": 4096,
                "query_pre_attn_scalar": 256,
                "tie_word_embeddings": True,
                "hidden_activation": "gelu_pytorch_tanh",
            },
            activation="hidden_activation",
            heads="divide",
            by_layer=("layer_types",),
            refuse=adapt.refuse_bidirectional,
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            names.PHI3,
            adapt.phi3,
            {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
            rotates_part=True,
            refuse=adapt.refuse_phi3,
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            names.LLAMA,
            adapt.smollm3,
            {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 4,
                "rope_theta": 2000000.0,
                "tie_word_embeddings": True,
            },
            by_layer=("no_rope_layers",),
        ),
        Family("olmo2", "Olmo2ForCausalLM", names.OLMO2, adapt.olmo2, CONTEXT | {"rms_norm_eps": 1e-5}),
        Family(
            "olmo3",
            "Olmo3ForCausalLM",
            names.OLMO2,
            adapt.olmo3,
            CONTEXT | {"rms_norm_eps": 1e-5, "sliding_window": 4096},
            by_layer=("layer_types",),
        ),
        Family(
            "exaone4",
            "Exaone4ForCausalLM",
            names.OLMO2,
            adapt.exaone4,
            CONTEXT
            | {"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
            by_layer=("layer_types",),
        ),
        Family(
            "ernie4_5",
            "Ernie4_5ForCausalLM",
            names.ERNIE,
            adapt.ernie,
            {
                "max_position_embeddings": 131072,
                "num_key_value_heads": 2,
                "head_dim": 128,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0,
                "tie_word_embeddings": True,
            },
        ),
        Family(
            "ministral3",
            "Ministral3ForCausalLM",
            names.LLAMA,
            adapt.ministral3,
            {
                "max_position_embeddings": 262144,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "rms_norm_eps": 1e-5,
                "rope_parameters": MINISTRAL_ROPE,
            },
        ),
        Family(
            "granitemoehybrid",
            "GraniteMoeHybridForCausalLM",
            names.GRANITE_HYBRID,
            adapt.granite_hybrid,
            CONTEXT | {"num_local_experts": 8, "shared_intermediate_size": 1024} | dict.fromkeys(GRANITE_SCALES, 1.0),
            {"intermediate_size": "shared_intermediate_size"},
            by_layer=("layer_types",),
            refuse=adapt.refuse_hybrid,
        ),
        Family(
            "stablelm",
            "StableLmForCausalLM",
            names.LLAMA,
            adapt.stablelm,
            {
                "max_position_embeddings": 4096,
                "num_key_value_heads": 32,
                "layer_norm_eps": 1e-5,
                "partial_rotary_factor": 0.25,
            },
            norm_eps="layer_norm_eps",
            heads="whole",
            rotates_part=True,
            refuse=adapt.refuse_stablelm,
        ),
        Family(
            "granite", "GraniteForCausalLM", names.LLAMA, adapt.granite, CONTEXT | dict.fromkeys(GRANITE_SCALES, 1.0)
        ),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            names.GPT2,
            adapt.gpt2,
            GPT2_DEFAULTS,
            GPT2_FIELDS,
            activation="activation_function",
            norm_eps="layer_norm_epsilon",
            heads="fixed",
            plain=adapt.plain_gpt2,
            refuse=adapt.refuse_gpt2,
        ),
        Family(
            "opt",
            "OPTForCausalLM",
            names.OPT,
            lambda decoder, config: adapt.learned(decoder),
            {
                "max_position_embeddings": 2048,
                "activation_function": "relu",
                "tie_word_embeddings": True,
                "layer_norm_eps": 1e-5,
            },
            {"intermediate_size": "ffn_dim"},
            activation="activation_function",
            norm_eps="layer_norm_eps",
            heads="fixed",
            plain=adapt.plain_opt,
            refuse=adapt.refuse_opt,
        ),
        Family(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            names.GPT_NEOX,
            adapt.gpt_neox,
            {
                "max_position_embeddings": 2048,
                "attention_bias": True,
                "use_parallel_residual": True,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-5,
                "rotary_pct": 0.25,
            },
            norm_eps="layer_norm_eps",
            heads="fixed",
            plain=adapt.plain_gpt_neox,
            rotates_part=True,
            refuse=adapt.refuse_gpt_neox,
        ),
        Family(
            "starcoder2",
            "Starcoder2ForCausalLM",
            names.STARCODER2,
            adapt.starcoder2,
            {
                "max_position_embeddings": 4096,
                "num_key_value_heads": 2,
                "hidden_act": "gelu_pytorch_tanh",
                "norm_epsilon": 1e-5,
                "use_bias": True,
                "tie_word_embeddings": True,
            },
            norm_eps="norm_epsilon",
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            names.MIXTRAL,
            adapt.mixtral,
            {
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1000000.0,
            },
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            names.QWEN3_MOE,
            adapt.qwen3_moe,
            {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 4,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "norm_topk_prob": False,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
            {"intermediate_size": "moe_intermediate_size"},
            refuse=adapt.refuse_mixed,
        ),
        Family(
            "hunyuan_v1_dense",
            "HunYuanDenseV1ForCausalLM",
            names.HUNYUAN,
            adapt.hunyuan,
            CONTEXT | {"rms_norm_eps": 1e-5},
        ),
        Family(
            "apertus",
            "ApertusForCausalLM",
            names.APERTUS,
            adapt.apertus,
            {"max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "rope_theta": 12000000.0, "hidden_act": "xielu"},
            activation="",
            heads="divide",
            plain=adapt.plain_apertus,
            refuse=adapt.refuse_apertus,
        ),
        Family(
            "olmoe",
            "OlmoeForCausalLM",
            names.QWEN3_MOE,
            adapt.olmoe,
            {
                "max_position_embeddings": 4096,
                "num_experts": 64,
                "num_experts_per_tok": 8,
                "norm_topk_prob": False,
                "rms_norm_eps": 1e-5,
            },
            heads="whole",
            refuse=adapt.refuse_olmoe,
        ),
        Family(
            "gpt_oss",
            "GptOssForCausalLM",
            names.GPT_OSS,
            adapt.gpt_oss,
            {
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "num_local_experts": 128,
                "num_experts_per_tok": 4,
                "sliding_window": 128,
                "attention_bias": True,
                "rms_norm_eps": 1e-5,
                "rope_theta": 150000.0,
                "swiglu_alpha": 1.702,
                "swiglu_limit": 7.0,
            },
            plain=adapt.plain_gpt_oss,
            by_layer=("layer_types",),
            refuse=adapt.refuse_gpt_oss,
        ),
        Family(
            "imagegpt",
            "ImageGPTForCausalImageModeling",
            names.GPT2,
            adapt.imagegpt,
            GPT2_DEFAULTS | {"activation_function": "quick_gelu", "tie_word_embeddings": False, "vocab_size": 513},
            GPT2_FIELDS,
            activation="activation_function",
            norm_eps="layer_norm_epsilon",
            heads="fixed",
            plain=adapt.plain_imagegpt,
            refuse=adapt.refuse_imagegpt,
        ),
        Family(
            "llamagen",
            "LlamaGenForCausalImage",
            names.LLAMAGEN,
            adapt.llamagen,
            {"rms_norm_eps": 1e-5},
            plain=adapt.plain_llamagen,
        ),
    )
}
