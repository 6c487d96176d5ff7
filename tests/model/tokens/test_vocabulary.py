import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from edgeprune.errors import InputError
from edgeprune.model.load import load_model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.model.tokens.vocabulary import (
    Vocabulary,
    ladder,
    needed,
    padded,
    read_vocabulary,
    reduced_config,
    retokenized,
    write_tokenizer_files,
)
from tests.support.checkpoints import LETTERS
from tests.support.vocabularies import (
    CORPUS,
    KINDS,
    SPECIAL,
    TEMPLATE,
    TEXT,
    all_splits,
    byte_level,
    edited,
    ids_of,
    ignore_merges,
    save,
)

WORDS = [word for line in CORPUS for word in line.split()]
NEEDED = [*CORPUS, *(before + word for word in WORDS for before in ("", " ", *SPECIAL))]
CHAT = [{"role": "system", "content": CORPUS[0]}, {"role": "user", "content": CORPUS[2]}]
unicode_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=24)


class Case(NamedTuple):
    source: Path
    target: Path
    full: Any
    reduced: Any
    vocabulary: Vocabulary


def made(source, target, texts):
    full = load_tokenizer(source)
    vocabulary = needed(source, ids_of(full, texts))
    write_tokenizer_files(source, target, vocabulary)
    return Case(source, target, full, load_tokenizer(target), vocabulary)


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    KINDS[request.param](folder / "full")
    return made(folder / "full", folder / "reduced", NEEDED)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    source = load_model("demo").directory
    return made(source, tmp_path_factory.mktemp("demo"), NEEDED)


def check_same(case, text, **settings):
    ids = np.array(case.full(text, **settings)["input_ids"], dtype=np.int64)
    assert case.vocabulary.keeps(ids).all()
    assert case.reduced(text, **settings)["input_ids"] == case.vocabulary.reduce(ids).tolist()


def check_comes_back(case, text):
    found, expected = (
        tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        for tokenizer in (case.reduced, case.full)
    )
    assert found == expected


def test_it_is_smaller_and_transformers_agrees_on_every_id(case):
    assert case.vocabulary.size < 0.9 * len(case.full)
    assert len(case.reduced) == case.vocabulary.size
    names = case.full.get_vocab()
    assert {t: int(case.vocabulary.restore(np.array(i))) for t, i in case.reduced.get_vocab().items()} == {
        token: number for token, number in names.items() if case.vocabulary.keeps(np.array(number))
    }
    auto = AutoTokenizer.from_pretrained(case.target, local_files_only=True)
    assert auto.get_vocab() == case.reduced.get_vocab()
    assert auto.special_tokens_map == case.full.special_tokens_map
    assert (read_vocabulary(case.target).kept == case.vocabulary.kept).all()
    assert read_vocabulary(case.source) is None


@given(words=st.lists(st.sampled_from(WORDS), max_size=8), special=st.sampled_from([" ", *SPECIAL]))
def test_texts_of_the_corpus_are_tokenised_as_before(case, words, special):
    check_same(case, special.join([" ".join(words), " ".join(words[:3])]))


@given(text=unicode_text)
def test_every_text_comes_back(case, text):
    check_comes_back(case, text)


@given(text=st.text(alphabet="abehs ▁<>0x19FéĠ日🙂\n", max_size=24))
def test_what_the_steps_put_in_comes_back(case, text):
    check_comes_back(case, text)


@pytest.mark.parametrize("prompted", [True, False])
def test_a_chat_is_tokenised_as_before(case, prompted):
    """The template's own words are in no sample."""
    assert "zebra" not in "".join(CORPUS)
    text = case.full.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompted)
    assert text == case.reduced.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompted)
    check_same(case, text, add_special_tokens=False)


@pytest.mark.slow
@pytest.mark.demo
@settings(deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), max_size=8), text=unicode_text)
def test_the_demo_tokenises_the_corpus_as_before_and_spells_the_rest(demo, words, text):
    check_same(demo, "<|im_start|>".join([" ".join(words), " ".join(words[:3])]))
    check_comes_back(demo, text)


@pytest.mark.demo
def test_the_demos_chat_is_tokenised_as_before(demo):
    assert demo.vocabulary.size < 3000
    for chat in (CHAT, CHAT[1:]):
        check_same(demo, demo.full.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    assert demo.reduced.decode([demo.reduced.eos_token_id]) == "<|im_end|>"
    named = json.loads((demo.target / "generation_config.json").read_text())
    assert named["eos_token_id"] == demo.reduced.eos_token_id


@pytest.mark.demo
def test_the_demos_ladder_is_filled_with_frequent_tokens(demo):
    aligned = padded(demo.source, demo.vocabulary)
    assert aligned.size % 64 == 0
    assert aligned.keeps(demo.vocabulary.kept).all()
    rungs = ladder(demo.source, demo.vocabulary, [4096, 16384, 49152, 60000])
    assert [rung.size for rung in rungs] == [4096, 16384, 49152, 49152]
    common = ids_of(demo.full, ["There were three people in the house and they had been there for years."])
    assert not demo.vocabulary.keeps(common).all()
    assert rungs[1].keeps(common).all()


def random_table(seed):
    """Any merges at all: several ways to a token, tokens out of reach, late parts of early merges; and a text."""
    random = np.random.default_rng(seed)
    tokens, pairs = ["a", "b"], []
    for _ in range(random.integers(1, 30)):
        pairs.append(tuple(random.choice(tokens, 2).tolist()))
        tokens += {"".join(pairs[-1])} - set(tokens)
    pairs += [pair for pair in all_splits(tokens) if random.random() < 0.7]
    pairs = list(dict.fromkeys(pairs))
    text = "".join(random.choice(["a", "b"], random.integers(1, 60)))
    return tokens[2:], [pairs[i] for i in random.permutation(len(pairs))], text


def save_table(folder, tokens, merges, **settings):
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate([*SPECIAL, *LETTERS, *tokens])}, merges=merges, **settings)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    save(folder, tokenizer)


def check_table(case, text, others):
    check_same(case, text)
    for other in others:
        check_comes_back(case, other)
        if case.vocabulary.keeps(ids_of(case.full, [other])).all():
            check_same(case, other)


seeds = st.integers(0, 2**32)
others = st.lists(st.text(alphabet="ab", min_size=1, max_size=14), max_size=5)


@settings(deadline=None, max_examples=100)
@given(seed=seeds, others=others, whole=st.booleans())
def test_merges_of_any_kind_give_the_same_tokens(tmp_path_factory, seed, others, whole):
    folder = tmp_path_factory.mktemp("table")
    tokens, merges, text = random_table(seed)
    save_table(folder / "full", tokens, merges, ignore_merges=whole)
    check_table(made(folder / "full", folder / "reduced", [text]), text, others)


@settings(deadline=None, max_examples=50)
@given(seed=seeds, others=others, size=st.integers(0, 290))
def test_a_filled_vocabulary_gives_the_same_tokens_too(tmp_path_factory, seed, others, size):
    folder = tmp_path_factory.mktemp("table")
    tokens, merges, text = random_table(seed)
    save_table(folder / "full", tokens, merges)
    full = load_tokenizer(folder / "full")
    least = needed(folder / "full", ids_of(full, [text]))
    smaller, larger = ladder(folder / "full", least, [size, size + 3])
    assert smaller.size == min(max(size, least.size), len(full))
    assert larger.keeps(smaller.kept).all()
    assert smaller.keeps(least.kept).all()
    write_tokenizer_files(folder / "full", folder / "reduced", smaller)
    case = Case(folder / "full", folder / "reduced", full, load_tokenizer(folder / "reduced"), smaller)
    check_table(case, text, others)


def test_only_the_parts_that_are_merged_are_needed(tmp_path):
    """`abc` can be made of `a` and `bc`, but never is."""
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    save_table(tmp_path, ["ab", "bc", "abc"], merges)
    full = load_tokenizer(tmp_path)
    kept = full.convert_ids_to_tokens(needed(tmp_path, ids_of(full, ["abc"])).kept.tolist())
    assert set(kept) == {*SPECIAL, *LETTERS, "ab", "abc"}


def test_the_ladder_goes_by_the_merges_and_then_by_id(tmp_path):
    save_table(tmp_path, ["odd", "abc", "cc", "ab"], [("a", "b"), ("ab", "c"), ("c", "c")])
    full = load_tokenizer(tmp_path)
    least = needed(tmp_path, np.array([], dtype=np.int64))
    rungs = ladder(tmp_path, least, range(least.size, least.size + 6))
    added = [set(full.convert_ids_to_tokens(rung.kept[~least.keeps(rung.kept)].tolist())) for rung in rungs]
    assert added == [set(), {"ab"}, {"ab", "abc"}, {"ab", "abc", "cc"}, {"ab", "abc", "cc", "odd"}] + [added[4]]
    assert padded(tmp_path, least, 4).size == 260
    assert padded(tmp_path, least, 64).size == len(full) == 262


@given(ids=st.lists(st.integers(0, 19), max_size=12), kept=st.sets(st.integers(0, 19), min_size=1))
def test_restore_undoes_reduce(ids, kept):
    vocabulary = Vocabulary(np.array(sorted(kept)))
    ids = np.array(ids, dtype=np.int64)
    assert vocabulary.keeps(ids).tolist() == [number in kept for number in ids.tolist()]
    inside = ids[vocabulary.keeps(ids)]
    assert (vocabulary.restore(vocabulary.reduce(inside)) == inside).all()
    assert vocabulary.reduce(vocabulary.kept.reshape(-1, 1)).tolist() == [[i] for i in range(vocabulary.size)]
    if len(inside) < len(ids):
        with pytest.raises(ValueError, match="is not kept"):
            vocabulary.reduce(ids)


@pytest.mark.parametrize("kept", [[], [1, 1], [2, 1], [-1, 2], [[1]], [0.5]])
def test_a_senseless_vocabulary_is_a_bug(kept):
    with pytest.raises(ValueError, match="ascending"):
        Vocabulary(np.array(kept))
    for wrong in (-1, 2):
        with pytest.raises(ValueError, match="0 to 1"):
            Vocabulary(np.array([3, 5])).restore(np.array([wrong]))


def documents(case):
    """The corpus, another text, specials within it, and a document that ends within a character."""
    other = TEXT[3000:5000]
    texts = [*CORPUS, other, f"{SPECIAL[1]}{other}{SPECIAL[0]}{CORPUS[0]} 日本{SPECIAL[0]}", "", "zebras 🙂", " é "]
    return [np.array(case.full(text)["input_ids"], dtype=np.int64) for text in texts]


def test_documents_of_old_ids_become_the_same_texts(case):
    given = documents(case)
    given.append(given[-2][:-1])
    found = retokenized(given, case.source, case.target)
    for old, new in zip(given, found, strict=True):
        assert new.dtype == np.int64
        assert case.reduced.decode(new.tolist()) == case.full.decode(old.tolist())
        if case.vocabulary.keeps(old).all():
            assert (case.vocabulary.restore(new) == old).all()
    assert not all(case.vocabulary.keeps(old).all() for old in given)


def test_documents_are_encoded_as_the_reduced_tokenizer_does(case):
    for text in (TEXT[3000:5000], "zebras of unusual size"):
        old = np.array(case.full(text)["input_ids"])
        assert not case.vocabulary.keeps(old).all()
        assert retokenized([old], case.source, case.target)[0].tolist() == case.reduced(text)["input_ids"]


def test_documents_need_a_reduced_tokenizer(case):
    with pytest.raises(InputError, match=r"has no vocabulary\.json"):
        retokenized([], case.source, case.source)


def test_ids_of_padded_rows_are_ignored(case):
    ids = ids_of(case.full, CORPUS)
    rows = np.array([len(case.full), len(case.full) + 63])
    assert (needed(case.source, np.concatenate([ids, rows])).kept == needed(case.source, ids).kept).all()
    assert retokenized([rows], case.source, case.target)[0].tolist() == []


def test_configured_ids_are_kept_and_renamed(tmp_path):
    byte_level(tmp_path / "full")
    full = load_tokenizer(tmp_path / "full")
    stop, ends = len(full) - 1, [0, len(full) - 2]
    edited(tmp_path / "full", "config.json", lambda c: c.update(vocab_size=640, eos_token_id=stop, pad_token_id=-1))
    edited(
        tmp_path / "full",
        "generation_config.json",
        lambda c: c.update(
            eos_token_id=ends,
            suppress_tokens=[stop, 400],
            bad_words_ids=[[stop, 0], [0, 400]],
            pad_token_id=None,
            temperature=0.6,
            bos_token_id=639,
        ),
    )
    vocabulary = needed(tmp_path / "full", np.array([], dtype=np.int64))
    assert not vocabulary.keeps(np.array(400))
    write_tokenizer_files(tmp_path / "full", tmp_path / "reduced", vocabulary)
    new_stop, *new_ends = vocabulary.reduce(np.array([stop, *ends])).tolist()
    assert json.loads((tmp_path / "reduced" / "generation_config.json").read_text()) == {
        "eos_token_id": new_ends,
        "suppress_tokens": [new_stop],
        "bad_words_ids": [[new_stop, 0]],
        "pad_token_id": None,
        "temperature": 0.6,
        "bos_token_id": None,
    }
    config = json.loads((tmp_path / "full" / "config.json").read_text()) | {"model_type": "llama"}
    assert reduced_config(config, vocabulary) == {
        "model_type": "llama",
        "vocab_size": vocabulary.size,
        "eos_token_id": new_stop,
        "pad_token_id": -1,
    }


def test_files_that_name_ids_are_renamed_or_left_out(tmp_path):
    """Of older transformers: added_tokens_decoder, added_tokens.json, special_tokens_map.json."""
    ignore_merges(tmp_path / "full")
    full = load_tokenizer(tmp_path / "full")
    end = full.eos_token_id
    special = {
        "content": "<|end|>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    edited(
        tmp_path / "full",
        "tokenizer_config.json",
        lambda c: c.update(added_tokens_decoder={str(end): special}, add_bos_token=True),
    )
    (tmp_path / "full" / "added_tokens.json").write_text(json.dumps({"<|end|>": end}))
    (tmp_path / "full" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|end|>"}))
    (tmp_path / "full" / "tokenizer.model").write_bytes(b"")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "full" / name).write_text("{}")
    edited(
        tmp_path / "full",
        "tokenizer.json",
        lambda c: c.update(
            padding={
                "strategy": "BatchLongest",
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": end,
                "pad_type_id": 0,
                "pad_token": "<|end|>",
            }
        ),
    )
    case = made(tmp_path / "full", tmp_path / "reduced", CORPUS)
    assert {path.name for path in case.target.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "vocabulary.json",
    }
    new_end = case.reduced.eos_token_id
    config = json.loads((case.target / "tokenizer_config.json").read_text())
    assert list(config["added_tokens_decoder"]) == [str(new_end)]
    assert json.loads((case.target / "tokenizer.json").read_text())["padding"]["pad_id"] == new_end
    check_same(case, CORPUS[0])
    assert case.reduced(CORPUS[0])["input_ids"][0] == case.reduced.bos_token_id
    batch = case.reduced(CORPUS[:3], padding=True)["input_ids"]
    assert case.vocabulary.restore(np.array(batch)).tolist() == case.full(CORPUS[:3], padding=True)["input_ids"]


def test_the_ids_in_pairs_of_a_post_processor_are_renamed(tmp_path):
    byte_level(tmp_path / "full")
    edited(
        tmp_path / "full",
        "tokenizer.json",
        lambda c: c.update(
            post_processor={
                "type": "RobertaProcessing",
                "sep": ["<|end|>", 0],
                "cls": ["zebra", c["model"]["vocab"]["zebra"]],
                "trim_offsets": False,
                "add_prefix_space": False,
            }
        ),
    )
    edited(tmp_path / "full", "tokenizer_config.json", lambda c: c.pop("chat_template", None))
    (tmp_path / "full" / "chat_template.jinja").unlink(missing_ok=True)
    case = made(tmp_path / "full", tmp_path / "reduced", CORPUS[:1])
    assert case.reduced.convert_ids_to_tokens(case.reduced(CORPUS[0])["input_ids"])[0] == "zebra"
    check_same(case, CORPUS[0])


def test_a_padding_token_without_a_row_stays_behind_the_rows(tmp_path):
    """transformers appends a special token that only tokenizer_config.json names."""
    byte_level(tmp_path / "full")
    rows = len(load_tokenizer(tmp_path / "full"))
    edited(tmp_path / "full", "config.json", lambda c: c.update(vocab_size=rows, model_type="llama"))
    edited(tmp_path / "full", "tokenizer_config.json", lambda c: c.update(pad_token="[PAD]"))
    case = made(tmp_path / "full", tmp_path / "reduced", CORPUS)
    assert case.full.pad_token_id == rows
    assert case.reduced.pad_token_id == case.vocabulary.size == len(case.reduced) - 1
    check_same(case, CORPUS[0])


def test_a_template_that_knows_no_system_still_tells_its_words(tmp_path):
    byte_level(tmp_path / "full")
    path = tmp_path / "full" / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    path.write_text(refusal + TEMPLATE)
    case = made(tmp_path / "full", tmp_path / "reduced", CORPUS)
    check_same(case, case.full.apply_chat_template(CHAT[1:], tokenize=False, add_generation_prompt=True))


def test_a_vocabulary_of_another_tokenizer_is_a_bug(tmp_path):
    byte_level(tmp_path / "full")
    with pytest.raises(ValueError, match="an id that no token has"):
        write_tokenizer_files(tmp_path / "full", tmp_path / "reduced", Vocabulary(np.array([0, 1, 5000])))
    with pytest.raises(ValueError, match=r"the added token <\|user\|>"):
        write_tokenizer_files(tmp_path / "full", tmp_path / "reduced", Vocabulary(np.array([0, 2])))
    assert not (tmp_path / "reduced").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"kept": [2, 1]}', '{"kept": "a"}', '{"kept": [1e99]}'])
def test_a_damaged_mapping_is_refused(tmp_path, content):
    (tmp_path / "vocabulary.json").write_text(content)
    with pytest.raises(InputError, match=r"vocabulary\.json is not"):
        read_vocabulary(tmp_path)
