"""config.json of a well-known model of every family, as published, and how many million parameters it has."""

from __future__ import annotations

LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _config(
    model_type: str, architecture: str, hidden: int, inner: int, layers: int, heads: int, groups: int, vocab: int,
    positions: int, **others: object,
) -> dict[str, object]:  # fmt: skip
    return {
        "model_type": model_type, "architectures": [architecture], "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocab,
        "max_position_embeddings": positions, "torch_dtype": "bfloat16", "use_cache": True,
    } | others  # fmt: skip


PUBLISHED: dict[str, tuple[dict[str, object], float]] = {
    "llama-3.2-1b": (_config(
        "llama", "LlamaForCausalLM", 2048, 8192, 16, 32, 8, 128256, 131072, head_dim=64, hidden_act="silu",
        rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=LLAMA3, tie_word_embeddings=True, attention_bias=False,
    ), 1235.81),
    "mistral-7b-v0.1": (_config(
        "mistral", "MistralForCausalLM", 4096, 14336, 32, 32, 8, 32000, 32768, hidden_act="silu", rms_norm_eps=1e-5,
        rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False,
    ), 7241.73),
    "qwen2.5-0.5b": (_config(
        "qwen2", "Qwen2ForCausalLM", 896, 4864, 24, 14, 2, 151936, 32768, hidden_act="silu", rms_norm_eps=1e-6,
        rope_theta=1000000.0, sliding_window=32768, max_window_layers=24, use_sliding_window=False,
        tie_word_embeddings=True,
    ), 494.03),
    "qwen3-0.6b": (_config(
        "qwen3", "Qwen3ForCausalLM", 1024, 3072, 28, 16, 8, 151936, 40960, head_dim=128, hidden_act="silu",
        rms_norm_eps=1e-6, rope_theta=1000000, rope_scaling=None, sliding_window=None, max_window_layers=28,
        use_sliding_window=False, attention_bias=False, tie_word_embeddings=True,
    ), 596.05),
    "gemma-2-2b": (_config(
        "gemma2", "Gemma2ForCausalLM", 2304, 9216, 26, 8, 4, 256000, 8192, head_dim=256, rms_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", rope_theta=10000.0,
        sliding_window=4096, query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        cache_implementation="hybrid", attention_bias=False,
    ), 2614.34),
    "gemma-3-1b": (_config(
        "gemma3_text", "Gemma3ForCausalLM", 1152, 6912, 26, 4, 1, 262144, 32768, head_dim=256, rms_norm_eps=1e-6,
        hidden_activation="gelu_pytorch_tanh", rope_theta=1000000, rope_local_base_freq=10000, rope_scaling=None,
        sliding_window=512, sliding_window_pattern=6, query_pre_attn_scalar=256, attn_logit_softcapping=None,
        final_logit_softcapping=None, cache_implementation="hybrid", attention_bias=False,
    ), 999.89),
    "phi-3-mini-4k": (_config(
        "phi3", "Phi3ForCausalLM", 3072, 8192, 32, 32, 32, 32064, 4096, hidden_act="silu", rms_norm_eps=1e-5,
        original_max_position_embeddings=4096, rope_theta=10000.0, rope_scaling=None, sliding_window=2047,
        tie_word_embeddings=False, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, attention_bias=False,
        resid_pdrop=0.0, pad_token_id=32000,
    ), 3821.08),
    "smollm3-3b": (_config(
        "smollm3", "SmolLM3ForCausalLM", 2048, 11008, 36, 16, 4, 128256, 65536, hidden_act="silu", rms_norm_eps=1e-6,
        rope_theta=5000000.0, rope_scaling=None, no_rope_layers=[1, 1, 1, 0] * 9, no_rope_layer_interval=4,
        layer_types=["full_attention"] * 36, sliding_window=None, use_sliding_window=False, attention_bias=False,
        mlp_bias=False, max_window_layers=28, pretraining_tp=2,
    ), 3075.10),
    "olmo-2-1b": (_config(
        "olmo2", "Olmo2ForCausalLM", 2048, 8192, 16, 16, 16, 100352, 4096, hidden_act="silu", rms_norm_eps=1e-6,
        rope_theta=500000, rope_scaling=None, tie_word_embeddings=False, attention_bias=False,
    ), 1484.92),
    "granite-3.1-2b": (_config(
        "granite", "GraniteForCausalLM", 2048, 8192, 40, 32, 8, 49155, 131072, hidden_act="silu", rms_norm_eps=1e-5,
        rope_theta=5000000.0, rope_scaling=None, attention_multiplier=0.015625, embedding_multiplier=12.0,
        residual_multiplier=0.22, logits_scaling=8.0, tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
    ), 2533.53),
    "gpt2": ({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "n_ctx": 1024,
        "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "layer_norm_epsilon": 1e-05,
        "vocab_size": 50257, "resid_pdrop": 0.1, "summary_type": "cls_index",
    }, 124.44),
    "opt-125m": ({
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "activation_function": "relu", "hidden_size": 768,
        "ffn_dim": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 50272,
        "max_position_embeddings": 2048, "word_embed_proj_dim": 768, "do_layer_norm_before": True, "prefix": "</s>",
        "_remove_final_layer_norm": False, "torch_dtype": "float16",
    }, 125.24),
    "pythia-160m": ({
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu", "hidden_size": 768,
        "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 50304,
        "max_position_embeddings": 2048, "layer_norm_eps": 1e-05, "rotary_emb_base": 10000, "rotary_pct": 0.25,
        "tie_word_embeddings": False, "use_parallel_residual": True, "torch_dtype": "float16",
    }, 162.32),
    "starcoder2-3b": (_config(
        "starcoder2", "Starcoder2ForCausalLM", 3072, 12288, 30, 24, 2, 49152, 16384, hidden_act="gelu_pytorch_tanh",
        norm_epsilon=1e-5, norm_type="layer_norm", mlp_type="default", rope_theta=999999.4420358813,
        sliding_window=4096, use_bias=True, embedding_dropout=0.1,
    ), 3030.37),
    "mixtral-8x7b-v0.1": (_config(
        "mixtral", "MixtralForCausalLM", 4096, 14336, 32, 32, 8, 32000, 32768, hidden_act="silu", rms_norm_eps=1e-5,
        rope_theta=1000000.0, sliding_window=None, num_local_experts=8, num_experts_per_tok=2,
        router_aux_loss_coef=0.02, output_router_logits=False, tie_word_embeddings=False,
    ), 46702.79),
    "qwen3-30b-a3b": (_config(
        "qwen3_moe", "Qwen3MoeForCausalLM", 2048, 6144, 48, 32, 4, 151936, 40960, head_dim=128, hidden_act="silu",
        rms_norm_eps=1e-6, rope_theta=1000000.0, rope_scaling=None, sliding_window=None, max_window_layers=48,
        use_sliding_window=False, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True, tie_word_embeddings=False,
        attention_bias=False,
    ), 30532.12),
    "imagegpt-small": ({
        "model_type": "imagegpt", "architectures": ["ImageGPTForCausalImageModeling"], "n_embd": 512, "n_layer": 24,
        "n_head": 8, "n_inner": None, "n_positions": 1024, "vocab_size": 513, "activation_function": "quick_gelu",
        "layer_norm_epsilon": 1e-05, "tie_word_embeddings": False, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False, "resid_pdrop": 0.1,
    }, 76.68),
    "llamagen-b-384": ({
        "model_type": "llamagen", "architectures": ["LlamaGenForCausalImage"], "hidden_size": 768,
        "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64,
        "intermediate_size": 2048, "vocab_size": 16384, "num_classes": 1000, "has_null_class": True,
        "image_side": 24, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    }, 110.89),
}  # fmt: skip
