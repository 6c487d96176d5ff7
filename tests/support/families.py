"""A small random model of transformers' own class, or of the original's, for every family: for parity tests."""

from __future__ import annotations

import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from edgeprune.model.checkpoint.families import FAMILIES
from tests.support import llamagen
from tests.support.checkpoints import save_tokenizer

BASE = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
FIXED = {"num_attention_heads": 4, "num_key_value_heads": None, "head_dim": None}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
EVEN = {"num_attention_heads": 4}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
    "long_factor": [2.0 + pair for pair in range(8)],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
}


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}


def _rope(**parameters: object) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0} | parameters


CASES: dict[str, dict[str, object]] = {
    "llama": EVEN,
    "llama, llama3 rope, biases, untied": EVEN
    | {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "llama, linear rope": EVEN | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "llama, multi-query": EVEN | {"num_key_value_heads": 1},
    "llama, multi-head": EVEN | {"num_key_value_heads": 4},
    "mistral, sliding window": {"sliding_window": 7},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2, yarn, late windows": {
        "rope_parameters": YARN,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {},
    "gemma": {},
    "gemma2": EVEN
    | {"sliding_window": 6, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
    "gemma3_text": EVEN | {"sliding_window": 6, "query_pre_attn_scalar": 24, "sliding_window_pattern": 2},
    "phi3": {"pad_token_id": 0},
    "phi3, longrope, partial rotary, sliding window": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 64,
        "sliding_window": 6,
        "pad_token_id": 0,
    },
    "smollm3": {"no_rope_layer_interval": 2, "pad_token_id": 0},
    "olmo2": {},
    "olmo3": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": YARN, "sliding_attention": DEFAULT_ROPE},
    },
    "exaone4": {"layer_types": ["full_attention"] * 3},
    "exaone4, windows, others without rope": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "ernie4_5": {},
    "ernie4_5, biases": {"use_bias": True},
    "ministral3": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    "granitemoehybrid": {
        "shared_intermediate_size": 96,
        "num_local_experts": 0,
        "layer_types": ["full_attention"] * 3,
        "position_embedding_type": "rope",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.22,
        "logits_scaling": 4.0,
    },
    "stablelm": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": None, "use_qkv_bias": True},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.22,
        "logits_scaling": 4.0,
    },
    "gpt2": FIXED,
    "opt": FIXED | {"ffn_dim": 96, "pad_token_id": 1},
    "gpt_neox": FIXED | {"num_attention_heads": 2, "rope_parameters": _rope(partial_rotary_factor=0.5)},
    "gpt_neox, serial residual": FIXED | {"rope_parameters": _rope(), "use_parallel_residual": False},
    "starcoder2": {"sliding_window": 7},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True},
    "hunyuan_v1_dense": {"rope_parameters": _rope() | {"rope_type": "dynamic", "alpha": 40.0, "factor": 1.0}},
    "apertus": {"num_attention_heads": 4, "head_dim": None},
    "olmoe": FIXED | {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        "swiglu_limit": 1.5,
        "rope_parameters": YARN | {"truncate": False},
    },
    "imagegpt": FIXED | {"vocab_size": 258, "max_position_embeddings": 64},
    "llamagen": {},
    "llamagen, grouped, head_dim 20": {"dim": 80, "groups": 2},
}

PICTURES = ("imagegpt", "llamagen")
TEXTS = [case for case in CASES if case.partition(",")[0] not in PICTURES]
# What other runtimes are tried with; docs/families.md names them.
COMPILED = [case for case in CASES if "," not in case or case.startswith("mistral") or "rotary" in case]
CONTINUED = [case for case in TEXTS if "," not in case or case.startswith("mistral")]
NOT_EXPORTED = ("opt", "apertus", "gpt_oss", "ernie4_5, biases", "exaone4, windows, others without rope")
EXPORTED = [case for case in TEXTS if case not in NOT_EXPORTED]


def random_model(case: str, **changes: object) -> PreTrainedModel | llamagen.LlamaGen:
    """Norms and biases are random too, so that none may be forgotten. changes: other settings than the case's."""
    model_type = case.partition(",")[0]
    if model_type == "llamagen":
        return llamagen.random_llamagen(**CASES[case] | changes)
    settings = BASE | CASES[case] | changes
    config = AutoConfig.for_model(model_type, **{k: v for k, v in settings.items() if v is not None})
    if model_type in ("gpt2", "imagegpt"):
        config.n_inner = 96
    if case == "exaone4":
        config.sliding_window = None
    torch.manual_seed(0)
    model = getattr(transformers, FAMILIES[model_type].architecture)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("_bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def save_family(folder: Path, case: str) -> PreTrainedModel | llamagen.LlamaGen:
    """Writes a family's model, built once for all tests; returns a copy of it that the caller may change."""
    model, files = _saved(case)
    shutil.copytree(files.name, folder, dirs_exist_ok=True)
    return copy.deepcopy(model)


@cache
def _saved(case: str) -> tuple[PreTrainedModel | llamagen.LlamaGen, tempfile.TemporaryDirectory]:
    model, files = random_model(case), tempfile.TemporaryDirectory()
    if isinstance(model, llamagen.LlamaGen):
        llamagen.save_directory(model, Path(files.name))
        return model, files
    model.save_pretrained(files.name)
    if case in TEXTS:
        save_tokenizer(Path(files.name))
    return model, files
