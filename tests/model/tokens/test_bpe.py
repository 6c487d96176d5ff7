"""BPE tokenizers: what their merges need, and which cannot be reduced."""

from functools import cache

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from edgeprune.errors import InputError
from edgeprune.model.tokens.vocabulary import needed
from tests.support.vocabularies import TEXT, byte_level, edited, save


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
