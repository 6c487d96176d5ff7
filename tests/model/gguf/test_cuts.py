"""Tokenizers of which llama.cpp would cut other tokens: refused, and the others are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, normalizers

from edgeprune.errors import InputError
from edgeprune.model.gguf.cuts import check_added, check_pieces
from edgeprune.model.gguf.export import check_exportable, export_gguf
from edgeprune.model.gguf.tokenizer_read import NORMAL
from edgeprune.model.load import load_model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from tests.support.llamacpp import VOCABULARY, LlamaCpp, save_merging_tokenizer
from tests.support.tiny import llama


def model_with(folder: Path, **flags: bool) -> Path:
    llama(
        vocab_size=len(VOCABULARY) + 1,
        hidden_size=64,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    ).save_pretrained(folder)
    save_merging_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<think>", special=False, **{"normalized": False} | flags)])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_plain_added_token_is_cut_as_llama_cpp_cuts_it(tmp_path: Path) -> None:
    folder = model_with(tmp_path / "plain")
    tokenizer = load_tokenizer(folder)
    running = LlamaCpp(export_gguf(load_model(str(folder)), tmp_path / "x.gguf"))
    for text in ("a <think> the", "x<think>the", " <think>\n the"):
        by_ids = running.log_probabilities(tokenizer(text)["input_ids"], len(tokenizer))
        assert np.abs(running.log_probabilities(text, len(tokenizer)) - by_ids).max() < 1e-4


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_a_flag_that_takes_other_text_along_is_refused(tmp_path: Path, flag: str) -> None:
    model = load_model(str(model_with(tmp_path / "flagged", **{flag: True})))
    with pytest.raises(InputError, match=f"'<think>' is {flag}, which a GGUF file cannot say"):
        check_exportable(model)


def described(*added: dict, normalizer: object = None) -> dict:
    backend = json.loads(_plain().to_str())
    backend["added_tokens"] = [
        {"id": 300 + index, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **token}
        for index, token in enumerate(added)
    ]
    backend["normalizer"] = normalizer
    return backend


def _plain():
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def test_normalized_matters_beside_a_normalizer_alone() -> None:
    token = {"content": "<Think>", "special": False, "normalized": True}
    check_added(described(token), "x")
    lower = json.loads(normalizers.Lowercase().__getstate__())
    with pytest.raises(InputError, match="is normalized"):
        check_added(described(token, normalizer=lower), "x")


def test_llama_cpp_knows_the_tokens_of_phi_3_by_the_models_name() -> None:
    tokens = [{"content": "<|user|>", "special": True, "rstrip": True}, {"content": "<s>", "special": True}]
    check_added(described(*tokens), "Phi-3-mini")
    with pytest.raises(InputError, match="is rstrip"):
        check_added(described(*tokens), "mini")
    with pytest.raises(InputError, match="is lstrip"):
        check_added(described({"content": "<|user|>", "special": True, "lstrip": True}), "phi-3")


def test_a_piece_that_two_others_join_to_needs_a_merge() -> None:
    tokens = ["▁", "t", "h", "e", "th", "the", "▁the"]
    fields = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [NORMAL] * len(tokens)}
    merges = [["t", "h"], ["th", "e"], ["▁", "the"]]
    check_pieces({"merges": merges}, fields)
    with pytest.raises(InputError, match="'▁the'"):
        check_pieces({"merges": merges[:2]}, fields)
    check_pieces({"merges": [["t", "h"], ["th", "e"]]}, {key: value[:6] for key, value in fields.items()})
