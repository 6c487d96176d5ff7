from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.model.gguf.pretokenizers import PRE_TOKENIZERS
from edgeprune.model.gguf.tokenizer_read import NORMAL, write_tokenizer
from tests.support.checkpoints import LETTERS, SPECIAL
from tests.support.gguf_tokenizers import CONTROL, byte_level, loaded
from tests.support.sentencepiece import CHARACTERS, PIECES, sentencepiece


def best_pair_first(text):
    """SentencePiece's BPE by its definition: merge the neighbours of the best piece, the leftmost first."""
    parts = list(text.replace(" ", "▁"))
    while True:
        found = [
            (PIECES.index(a + b), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in PIECES
        ]
        if not found:
            return [byte for part in parts for byte in known(part)]
        _, place = min(found)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def known(part):
    return [part] if part in PIECES + CHARACTERS else [f"<0x{value:02X}>" for value in part.encode()]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return loaded(sentencepiece(), tmp_path_factory.mktemp("sentencepiece"))


@given(text=st.text(alphabet="abc .é日🙂\n", min_size=1, max_size=24))
def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(pieces, text):
    tokens = pieces.convert_ids_to_tokens(pieces(text)["input_ids"])
    assert tokens == ["<s>", *best_pair_first("▁" + text)]
    assert pieces.decode(pieces(text)["input_ids"], skip_special_tokens=True) == text


def test_sentencepiece_without_prefix_and_bos(tmp_path):
    tokenizer = loaded(sentencepiece(add_space_prefix=False, add_bos_token=False), tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc a")["input_ids"]) == ["ab", "c", "▁a"]


@pytest.fixture(scope="module", params={words: name for name, words in PRE_TOKENIZERS.items()}.values())
def letters(request, tmp_path_factory):
    return loaded(byte_level(request.param), tmp_path_factory.mktemp(request.param))


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20))
def test_every_text_comes_back(letters, text):
    """As it was, or composed where the family's own tokenizer composes."""
    again = letters.decode(letters(text, add_special_tokens=False)["input_ids"])
    assert again == (text if letters.backend_tokenizer.normalizer is None else normalize("NFC", text))


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", ["<|end|>", "abc"]), ("gpt-2", ["a", "b", "c"])])
def test_tiktoken_families_take_whole_words_and_start_with_bos(tmp_path, pre, expected):
    """`abc` is in the vocabulary and no merge leads to it."""
    fields = byte_level(pre, tokens=[*SPECIAL, *LETTERS, "abc"], token_type=[CONTROL] + [NORMAL] * 257)
    tokenizer = loaded(fields, tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc")["input_ids"]) == expected


def test_the_file_decides_on_bos(tmp_path):
    (tmp_path / "off").mkdir()
    (tmp_path / "on").mkdir()
    off = loaded(byte_level("llama-bpe", add_bos_token=False), tmp_path / "off")
    on = loaded(byte_level("gpt-2", add_bos_token=True), tmp_path / "on")
    assert off("a")["input_ids"] == on("a")["input_ids"][1:]
    assert on("a")["input_ids"][0] == on.bos_token_id == 0


BAD = {
    "another kind": (byte_level("gpt-2", model="bert"), "unsupported GGUF tokenizer 'bert'"),
    "no kind": ({}, "unsupported GGUF tokenizer None"),
    "another pattern": (byte_level("klingon"), "unsupported GGUF pre-tokenizer 'klingon'"),
    "no tokens": ({"tokenizer.ggml.model": "gpt2"}, "damaged"),
    "merges of unknown tokens": (byte_level("gpt-2", merges=["xx yy"]), "damaged"),
    "a merge of one": (byte_level("gpt-2", merges=["a"]), "damaged"),
    "a bos beyond the vocabulary": (byte_level("gpt-2", bos_token_id=4000), "damaged"),
    "types of another vocabulary": (byte_level("gpt-2", token_type=[1, 1]), "damaged"),
    "no scores": ({k: v for k, v in sentencepiece().items() if not k.endswith("scores")}, "damaged"),
    "scores of another vocabulary": (sentencepiece(scores=[0.0]), "damaged"),
}


@pytest.mark.parametrize(("fields", "reason"), BAD.values(), ids=BAD)
def test_what_cannot_be_built_is_said(tmp_path, fields, reason):
    with pytest.raises(InputError) as caught:
        write_tokenizer(fields, 256, tmp_path)
    assert reason in caught.value.message
    assert "Hugging Face directory" in caught.value.remedy
    assert not list(tmp_path.iterdir())
