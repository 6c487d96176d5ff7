"""The configuration of the model that a GGUF file's metadata describes."""

import numpy as np
import pytest

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.configuration import LAYER_WIDTHS, decoder_of
from edgeprune.model.gguf.config import config_of
from edgeprune.model.gguf.file import RESTORE, Metadata
from edgeprune.model.gguf.names import ARCHITECTURES

PLAIN = {
    "block_count": 12,
    "context_length": 256,
    "embedding_length": 96,
    "feed_forward_length": 64,
    "attention.head_count": 6,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
}


def metadata(architecture: str = "llama", names=(), drop=(), **changes: object) -> Metadata:
    """changes: of the architecture's own fields, `_` for `.` in `general_` and `split_` fields."""
    own = {name: value for name, value in (PLAIN | changes).items() if name not in drop}
    fields = {f"{architecture}.{name}": value for name, value in own.items()}
    fields |= {"general.architecture": architecture, "tokenizer.ggml.tokens": ["a"] * 30}
    return Metadata(fields, {"output.weight", *names}, {})


def config(*words, **changes):
    return config_of(metadata(*words, **changes), "m.gguf")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_a_decoder_of_its_sizes(name):
    changes = {"expert_count": 4, "expert_used_count": 2} if name in ("qwen3moe", "olmoe") else {}
    changes |= {"attention.head_count_kv": 6} if name in ("gpt2", "gptneox") else {}
    file = metadata(name, **changes)
    file.fields["gptneox.use_parallel_residual"] = True
    decoder = decoder_of(config_of(file, "m.gguf"))
    attention = decoder.layers[0].attention
    assert (len(decoder.layers), decoder.hidden_size, decoder.vocab_size) == (12, 96, 30)
    assert (attention.num_attention_heads, attention.head_dim) == (6, 16)
    assert attention.num_key_value_heads == (6 if name in ("gpt2", "gptneox") else 2)
    assert decoder.norm_eps == 1e-6  # not 9.999999974752427e-07
    assert decoder.tie_word_embeddings == (name in ("gemma", "gemma2"))
    assert (attention.rotary is None) == (name == "gpt2")


def test_what_runs_as_llama_is_told_apart_by_its_tensors_and_sizes():
    qkv = ["blk.0.attn_q.bias"]
    assert config()["model_type"] == "llama"
    assert config(names=qkv)["model_type"] == "qwen2"
    both = config(names=[*qkv, "blk.0.attn_output.bias", "blk.0.ffn_down.bias"])
    assert (both["model_type"], both["attention_bias"], both["mlp_bias"]) == ("llama", True, True)
    assert (
        config(**{"attention.head_count": 5, "attention.head_count_kv": 5, "attention.key_length": 16})["model_type"]
        == "mistral"
    )
    experts = config(expert_count=8, expert_used_count=2)
    assert (experts["model_type"], experts["num_local_experts"], experts["num_experts_per_tok"]) == ("mixtral", 8, 2)


def test_windows_follow_the_files_pattern_or_the_architectures():
    def sliding(name: str, **changes: object) -> list[int]:
        types = config(name, **{"attention.sliding_window": 32} | changes)["layer_types"]
        return [index for index, kind in enumerate(types) if kind == "sliding_attention"]

    assert sliding("gemma2") == [0, 2, 4, 6, 8, 10]
    assert sliding("gemma3") == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert sliding("gemma3", **{"attention.sliding_window_pattern": 3}) == [0, 1, 3, 4, 6, 7, 9, 10]
    assert sliding("olmo2") == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    listed = [True] + [False] * 11
    assert sliding("gemma2", **{"attention.sliding_window_pattern": listed}) == [0]
    assert sliding("gemma3", **{"attention.sliding_window": None}) == []


def test_layers_of_deci_have_widths_of_their_own():
    changes = {"attention.head_count": [6, 0] * 6, "attention.head_count_kv": [2, 0] * 6}
    described = config("deci", **changes, feed_forward_length=[96, 32] * 6)
    assert described["model_type"] == "llama"
    assert described[LAYER_WIDTHS] == [(2, 3, 96), (0, 1, 32)] * 6
    assert (described["num_attention_heads"], described["num_key_value_heads"]) == (6, 2)
    assert [layer.attention is None for layer in decoder_of(described).layers] == [False, True] * 6


def test_older_files_leave_out_what_follows_from_other_fields():
    old = config(drop=("attention.head_count_kv", "attention.layer_norm_rms_epsilon"))
    assert (old["num_key_value_heads"], old["rms_norm_eps"], old["head_dim"]) == (6, 1e-5, 16)
    same = config(**{"attention.head_count_kv": [2] * 12})
    assert same["num_key_value_heads"] == 2


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("llama", {"drop": ("block_count",)}, "missing or unusable metadata: no llama.block_count"),
        ("llama", {"attention.value_length": 8}, "value_length 8 differs from attention.key_length 16"),
        ("llama", {"attention.head_count_kv": [2] * 11 + [1]}, "differs between layers"),
        ("llama", {"attention.head_count": 0}, "missing or unusable metadata: ZeroDivisionError"),
        ("granite", {"expert_count": 8}, "'granite' with experts"),
        ("exaone4", {"block_count": 64}, "'exaone4' with sliding windows"),
        ("deci", {"feed_forward_length": [96] * 11 + [0]}, "'deci' with attention but no MLP in layer 11"),
        ("deci", {"attention.head_count_kv": [0] + [2] * 11}, "attention but no key/value heads in layer 0"),
        ("deci", {"feed_forward_length": [96] * 11}, "feed_forward_length of 11 layers, not 12"),
        ("mamba", {}, "unsupported GGUF architecture 'mamba'"),
    ],
)
def test_what_no_configuration_can_say_is_refused(architecture, changes, reason):
    with pytest.raises(InputError) as caught:
        config(architecture, **changes)
    assert reason in caught.value.message
    assert (caught.value.remedy == RESTORE) == ("missing or unusable" in caught.value.message)


def test_a_part_of_a_file_is_not_taken_for_the_whole():
    file = metadata()
    file.fields["split.count"] = 3
    with pytest.raises(InputError, match=r"m\.gguf is one of 3 parts") as caught:
        config_of(file, "m.gguf")
    assert "llama-gguf-split --merge" in caught.value.remedy
