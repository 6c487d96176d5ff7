"""The pre-tokenizers by their names: their words, and how a checkpoint's own is recognised."""

import inspect

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import tokenization_utils_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2 import tokenization_qwen2

from edgeprune.errors import InputError
from edgeprune.model.gguf.pretokenizers import (
    HASHES,
    LLAMA3_SPLIT,
    PRE_TOKENIZERS,
    QWEN2_SPLIT,
    TEKKEN_SPLIT,
    pre_tokenizer_name,
)
from edgeprune.model.gguf.tokenizer_read import write_tokenizer
from edgeprune.model.gguf.tokenizer_write import tokenizer_fields
from edgeprune.model.load import load_model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from tests.support.gguf_tokenizers import byte_level, loaded
from tests.support.llamacpp import MERGES, VOCABULARY, save_merging_tokenizer

WORDS = {
    "gpt-2": ["I", "'ll", "Ġpay", "Ġ1234", "."],
    "smollm": ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "."],
    "llama-bpe": ["I", "'ll", "Ġpay", "Ġ", "123", "4", "."],
    "qwen2": ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "."],
    "gpt-4o": ["I'll", "Ġpay", "Ġ", "123", "4", "."],
    "tekken": ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "."],
}


@pytest.mark.parametrize(("pre", "words"), WORDS.items(), ids=WORDS)
def test_words_are_split_as_the_family_does(tmp_path, pre, words):
    splitter = loaded(byte_level(pre), tmp_path).backend_tokenizer.pre_tokenizer
    assert [word for word, _ in splitter.pre_tokenize_str("I'll pay 1234.")] == words


def test_the_patterns_are_those_that_transformers_has():
    assert inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default == LLAMA3_SPLIT
    assert tokenization_qwen2.PRETOKENIZE_REGEX == QWEN2_SPLIT
    assert TEKKEN_SPLIT in inspect.getsource(tokenization_utils_tokenizers)


@pytest.mark.parametrize("name", {words: name for name, words in reversed(PRE_TOKENIZERS.items())}.values())
def test_a_tokenizer_of_unknown_tokens_is_known_by_its_making(tmp_path, name):
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": VOCABULARY,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
        "tokenizer.ggml.bos_token_id": 0,
    }
    write_tokenizer(fields, 256, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert tokenizer_fields(tmp_path, len(VOCABULARY), reduced=True)["tokenizer.ggml.pre"] == name


def test_every_hash_names_a_known_pre_tokenizer():
    assert set(HASHES.values()) <= PRE_TOKENIZERS.keys()
    assert all(len(digest) == 64 for digest in HASHES)


@pytest.mark.slow
@pytest.mark.demo
def test_the_demo_is_known_by_its_tokens_as_llama_cpps_converter_knows_it():
    tokenizer = load_tokenizer(load_model("demo").directory)
    assert pre_tokenizer_name(tokenizer, {}) == "smollm"


def other_words(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[aeiou]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def small_letters(tokenizer):
    tokenizer.normalizer = normalizers.Lowercase()


@pytest.mark.parametrize("change", [other_words, small_letters])
def test_another_pre_tokenizer_is_refused_not_guessed(tmp_path, change):
    save_merging_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    change(tokenizer.backend_tokenizer)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="pre-tokenizer is not one of those"):
        tokenizer_fields(tmp_path, len(VOCABULARY))
