"""BPE tokenizers: what their merges need, and which cannot be reduced."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from edgeprune.errors import InputError
from edgeprune.model.tokens.bpe import (
    BYTE_TOKENS,
    Bpe,
    add_with_parts,
    by_merge,
    fixed_tokens,
    map_processor,
    parts_of,
    read_bpe,
    read_object,
)
from edgeprune.model.tokens.vocabulary import needed
from tests.support.checkpoints import LETTERS
from tests.support.vocabularies import KINDS, SPECIAL, TEXT, all_splits, byte_level, edited, save


@cache
def letters_of_text():
    return {letter: i for i, letter in enumerate(["<|end|>", *sorted(set(TEXT))])}


UNFIT = {
    "WordPiece": lambda: models.WordPiece(vocab=letters_of_text(), unk_token="<|end|>"),
    "Unigram": lambda: models.Unigram([(token, -1.0) for token in letters_of_text()], unk_id=0),
    "WordLevel": lambda: models.WordLevel(vocab=letters_of_text(), unk_token="<|end|>"),
    "without byte level": lambda: models.BPE(vocab=letters_of_text(), merges=[]),
    "256 bytes": lambda: models.BPE(vocab=letters_of_text(), merges=[], byte_fallback=True),
    "end_of_word_suffix": lambda: models.BPE(vocab=letters_of_text(), merges=[], end_of_word_suffix="</w>"),
}


@pytest.mark.parametrize(("reason", "model"), UNFIT.items(), ids=UNFIT)
def test_other_tokenizers_are_refused_by_name(tmp_path, reason, model):
    tokenizer = Tokenizer(model())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|end|>"])
    save(tmp_path, tokenizer)
    with pytest.raises(InputError) as caught:
        needed(tmp_path, np.array([0]))
    assert reason in caught.value.message
    assert "Byte-level BPE" in caught.value.remedy


def test_tokens_beyond_the_rows_are_refused(tmp_path):
    byte_level(tmp_path)
    edited(tmp_path, "config.json", lambda c: c.update(vocab_size=300, model_type="llama"))
    with pytest.raises(InputError, match="tokens beyond the model's 300 rows"):
        needed(tmp_path, np.array([0]))


seeds = st.integers(0, 2**32)


def random_merges(seed: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges of two letters in any order, with several ways to a token."""
    random = np.random.default_rng(seed)
    tokens, merges = ["a", "b"], []
    for _ in range(random.integers(1, 12)):
        merges.append(tuple(random.choice(tokens, 2).tolist()))
        tokens += {"".join(merges[-1])} - set(tokens)
    merges = list(dict.fromkeys([*merges, *(pair for pair in all_splits(tokens) if random.random() < 0.5)]))
    return tokens, [merges[i] for i in random.permutation(len(merges))]


def spelled(tokens: list[str], merges: list[tuple[str, str]], text: str) -> list[str]:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=merges)).encode(text).tokens


@settings(deadline=None)
@given(seed=seeds)
def test_parts_are_what_a_token_is_spelled_with_once_its_last_merge_is_gone(seed):
    tokens, merges = random_merges(seed)
    parts = parts_of({"merges": merges})
    for token in tokens[2:]:
        if spelled(tokens, merges, token) == [token]:
            assert spelled(tokens, [pair for pair in merges if pair != parts(token)], token) == list(parts(token))
    assert parts("a") == parts("unknown") == ()


@settings(deadline=None)
@given(seed=seeds)
def test_every_token_stands_behind_its_parts(seed):
    tokens, merges = random_merges(seed)
    parts = parts_of({"merges": merges})
    order = list(add_with_parts({}, reversed(tokens), parts))
    assert sorted(order) == sorted(tokens)
    assert all(order.index(part) < order.index(token) for token in tokens for part in parts(token))
    ids = {token: number for number, token in enumerate([*tokens, "odd"])}
    bpe = Bpe(None, {"model": {"merges": merges}}, ids, {})
    by_merges = by_merge(bpe)
    assert sorted(by_merges) == list(range(len(ids)))
    assert by_merges[-1] == ids["odd"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_every_text_is_spelled_with_is_fixed(tmp_path, kind):
    KINDS[kind](tmp_path)
    bpe = read_bpe(tmp_path)
    assert bpe.ids == bpe.loaded.get_vocab()
    fixed = fixed_tokens(bpe)
    assert set(SPECIAL) < fixed
    assert (fixed >= BYTE_TOKENS) == (kind == "byte fallback")
    assert (set(LETTERS) <= fixed) == (kind != "byte fallback")
    assert ("▁" in fixed) == (kind == "byte fallback")  # what stands for a space
    assert "zebra" not in fixed


def test_ids_in_every_kind_of_post_processor_are_changed():
    template = {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [1, 2]}}, "single": []}
    roberta = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0], "trim_offsets": True}
    level = {"type": "ByteLevel", "trim_offsets": False}
    whole = {"type": "Sequence", "processors": [template, roberta, level]}
    first, second, third = map_processor(whole, lambda number: number + 10)["processors"]
    assert first == template | {"special_tokens": {"<s>": {"id": "<s>", "ids": [11, 12]}}}
    assert second == roberta | {"sep": ["</s>", 12], "cls": ["<s>", 10]}
    assert third == level
    assert map_processor(None, lambda number: number + 10) is None
    assert template["special_tokens"]["<s>"]["ids"] == [1, 2]


@pytest.mark.parametrize(("content", "reason"), [("{", "is not JSON"), ("[1]", "is not a JSON object")])
def test_a_file_that_holds_no_object_is_refused(tmp_path, content, reason):
    path = tmp_path / "config.json"
    assert read_object(path) == {}
    path.write_text(content)
    with pytest.raises(InputError, match=reason) as caught:
        read_object(path)
    assert caught.value.remedy == "Restore the checkpoint's own file."
