"""Tokenizers of which llama.cpp would cut other tokens: refused or said, and the others are not."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from edgeprune.errors import InputError
from edgeprune.model.gguf.cuts import check_pieces, names, other_cut, tell_cut
from edgeprune.model.gguf.export import check_exportable, export_gguf
from edgeprune.model.gguf.file import read_gguf
from edgeprune.model.gguf.tokenizer_read import NORMAL
from edgeprune.model.load import load_model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from tests.support.llamacpp import VOCABULARY, LlamaCpp, save_merging_tokenizer
from tests.support.sentencepiece import BYTES
from tests.support.tiny import llama


def save_model(folder: Path, vocab_size: int) -> None:
    sizes = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama(vocab_size=vocab_size, max_position_embeddings=256, **sizes).save_pretrained(folder)


def model_with(folder: Path, *added: dict) -> Path:
    save_model(folder, len(VOCABULARY) + len(added))
    save_merging_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.add_tokens([AddedToken(**{"special": False, "normalized": False} | t) for t in added])
    tokenizer.save_pretrained(folder)
    return folder


def greatest_error(folder: Path, file: Path, texts: tuple[str, ...]) -> float:
    """Of llama.cpp's logarithms of probabilities after texts, against those after transformers' ids of them."""
    tokenizer, running = load_tokenizer(folder), LlamaCpp(export_gguf(load_model(str(folder)), file))
    both = [
        [running.log_probabilities(prompt, len(tokenizer)) for prompt in (t, tokenizer(t)["input_ids"])] for t in texts
    ]
    return max(np.nanmax(np.abs(by_text - by_ids)) for by_text, by_ids in both)


def test_a_plain_added_token_is_cut_as_llama_cpp_cuts_it(tmp_path: Path) -> None:
    folder = model_with(tmp_path / "plain", {"content": "<think>"})
    assert greatest_error(folder, tmp_path / "x.gguf", ("a <think> the", "x<think>the", " <think>\n the")) < 1e-4


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_a_flag_that_takes_other_text_along_is_refused(tmp_path: Path, flag: str) -> None:
    model = load_model(str(model_with(tmp_path / "flagged", {"content": "<think>", flag: True})))
    with pytest.raises(InputError, match=f"'<think>' is {flag}, which a GGUF file cannot say"):
        check_exportable(model)


def described(*added: dict, normalizer: object = None) -> Tokenizer:
    """A byte-level tokenizer with these added tokens, which have no flags of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens([AddedToken(**{"normalized": False} | token) for token in added])
    return tokenizer


def plain(*added: dict) -> Tokenizer:
    """What a GGUF file says of a tokenizer with these added tokens."""
    return described(*({"content": token["content"]} for token in added))


def test_normalized_matters_beside_a_normalizer_alone() -> None:
    token = {"content": "<Think>", "normalized": True}
    assert other_cut(described(token), plain(token)) is None
    lower = described(token, normalizer=normalizers.Lowercase())
    with pytest.raises(InputError, match="'<Think>' is normalized"):
        tell_cut(other_cut(lower, plain(token)))


PHI3_TOKENS = [{"content": content} for content in ("<unk>", "<s>", "<|endoftext|>")]
PHI3_TOKENS += [{"content": content, "rstrip": True} for content in ("</s>", "<|user|>")]


def test_a_model_is_a_phi_3_by_its_name_where_it_has_the_tokens() -> None:
    """Without them llama.cpp loads no model of this name."""
    tokenizer, other = plain(*PHI3_TOKENS), plain({"content": "<s>"})
    assert list(names("tuned", tokenizer)) == ["tuned", "Phi-3 tuned"]
    assert list(names("my-Phi3.5", tokenizer)) == ["my-Phi3.5", "my-Phi 3.5"]
    assert list(names("tuned", other)) == ["tuned"]
    assert list(names("my-Phi-3.5", other)) == ["my-Phi 3.5"]


@pytest.mark.parametrize(("rstrip", "name"), [(True, "Phi-3 tuned"), (False, "my-phi 3")])
def test_the_name_in_the_file_is_that_under_which_llama_cpp_cuts_alike(tmp_path: Path, rstrip: bool, name: str) -> None:
    """The tokens of Phi-3 take the space behind them along, those of no other model do."""
    added = [token | ({"rstrip": rstrip} if "rstrip" in token else {}) for token in PHI3_TOKENS]
    folder, file = model_with(tmp_path / "model", *added), tmp_path / ("tuned.gguf" if rstrip else "my-phi-3.gguf")
    description = json.loads((folder / "tokenizer.json").read_text())
    description["added_tokens"][0]["rstrip"] = rstrip  # <|end|>
    (folder / "tokenizer.json").write_text(json.dumps(description))
    assert greatest_error(folder, file, ("the <|user|> the", "<|user|>\n the<s> the")) < 1e-4
    assert read_gguf(file).fields["general.name"] == name
    again = load_tokenizer(load_model(str(file)).directory)  # and what is read of it cuts so too
    assert again("the <|user|> the")["input_ids"] == load_tokenizer(folder)("the <|user|> the")["input_ids"]


@pytest.mark.parametrize("scheme", ["normalizer", "first", "never"])
def test_a_space_that_llama_cpp_alone_puts_behind_an_added_token_is_said(
    tmp_path: Path, scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It has the checkpoint's own space where a normalizer puts it before every stretch of a text, or nothing does."""
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a")]
    vocabulary = ["<unk>", "<s>", "</s>", *BYTES, *"▁aehtx", *map("".join, merges)]
    ids = {token: index for index, token in enumerate(vocabulary)}
    backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (*vocabulary[:3], "<think>")])
    save_model(tmp_path / scheme, len(vocabulary) + 1)
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **words).save_pretrained(tmp_path / scheme)
    with caplog.at_level(logging.WARNING, "edgeprune"):
        error = greatest_error(tmp_path / scheme, tmp_path / "x.gguf", ("a <think> the", "x<think>the", "<think>the"))
    assert (error > 1e-4) == (scheme == "first") == ("puts a space behind them" in caplog.text)


def test_a_piece_that_two_others_join_to_needs_a_merge() -> None:
    tokens = ["▁", "t", "h", "e", "th", "the", "▁the"]
    fields = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [NORMAL] * len(tokens)}
    merges = [["t", "h"], ["th", "e"], ["▁", "the"]]
    check_pieces({"merges": merges}, fields)
    with pytest.raises(InputError, match="'▁the'"):
        check_pieces({"merges": merges[:2]}, fields)
    check_pieces({"merges": [["t", "h"], ["th", "e"]]}, {key: value[:6] for key, value in fields.items()})
    merges += [["h", "e"]]
    fields = {"tokenizer.ggml.tokens": [*tokens, "he"], "tokenizer.ggml.token_type": [NORMAL] * (len(tokens) + 1)}
    with pytest.raises(InputError, match="'the' of 't' and 'he'"):  # merges make it in another way alone
        check_pieces({"merges": merges}, fields)
    check_pieces({"merges": [*merges, ["t", "he"]]}, fields)
