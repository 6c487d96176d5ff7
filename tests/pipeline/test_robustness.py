"""Odd input: the windows of each variant of the held-out text, and both models' losses on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from edgeprune.evaluate.perplexity import document_losses, rise
from edgeprune.evaluate.perturb import PERTURBATIONS
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.save import save_checkpoint
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.model.tokens.vocabulary import Vocabulary, needed
from edgeprune.pipeline import robustness as odd
from edgeprune.pipeline.journal import open_journal
from edgeprune.pipeline.kind import Images, Language
from edgeprune.progress import Silent
from tests.support.checkpoints import save_llama
from tests.support.vocabularies import CORPUS, TEXT, byte_level, ids_of

CONTEXT = 256


@dataclass(frozen=True)
class Home:
    dense: Model
    fitted: Model
    texts: dict[str, list[np.ndarray]]
    folder: Path


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    folder = tmp_path_factory.mktemp("odd")
    save_llama(folder / "model", vocab_size=640, max_position_embeddings=CONTEXT)
    byte_level(folder / "model")
    dense = load_model(str(folder / "model"))
    fitted = scaled(dense, folder / "fitted")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = {"manual": (TEXT[1200:3600] * 2).splitlines(), "notes": TEXT[3600:].splitlines()}
    tokens = {name: [np.array(tokenizer(text)["input_ids"]) for text in of] for name, of in texts.items()}
    return Home(dense, fitted, tokens, folder)


def scaled(model: Model, folder: Path, vocabulary: Vocabulary | None = None) -> Model:
    """The model with smaller outputs of its MLPs, and with a vocabulary of its own."""
    decoder = model.decoder
    tensors = ((name, model.weights[name] * (0.3 if name.endswith("down") else 1)) for name in decoder.shapes())
    target = decoder if vocabulary is None else decoder.with_vocabulary(vocabulary.size)
    save_checkpoint(target, tensors, model, folder, vocabulary)
    return load_model(str(folder))


def variants(home: Home, context: int = CONTEXT, seed: int = 0) -> dict[str, odd.Variant]:
    return {variant.name: variant for variant in odd.variants_of(home.dense, home.texts, context, seed)}


def test_every_change_has_a_few_short_windows_and_the_long_one_is_long(home):
    found = variants(home)
    assert list(found) == ["unchanged", *(change.name for change in PERTURBATIONS), "text notes", "long"]
    for name, variant in found.items():
        lengths = [len(row) for row in variant.windows]
        if name == "long":
            assert lengths == [CONTEXT] * odd.LONG_WINDOWS
        else:
            assert len(lengths) <= odd.WINDOWS
            assert 1 < max(lengths) <= odd.TOKENS
    assert sum(map(len, (row for v in found.values() for row in v.windows))) <= odd.read_tokens(others=1)


def test_a_long_window_has_no_more_tokens_than_the_context(home):
    assert {len(row) for row in variants(home, context=200)["long"].windows} == {200}
    assert "long" not in variants(home, context=2 * odd.TOKENS - 1)


def test_the_windows_are_the_changed_text_in_tokens(home):
    tokenizer = AutoTokenizer.from_pretrained(home.dense.directory)
    clean = [tokenizer.decode(row) for row in variants(home)["unchanged"].windows]
    for text, row in zip(clean, variants(home)["upper case"].windows, strict=True):
        written = tokenizer.decode(row)
        assert text.upper().startswith(written[:-1])  # a character may be cut at the end
    assert all(text in "".join(tokenizer.decode(of) for of in home.texts["manual"]) for text in clean)


def test_a_seed_gives_the_same_windows_and_another_one_others(home):
    def typos(seed: int) -> list[list[int]]:
        return [row.tolist() for row in variants(home, seed=seed)["typos"].windows]

    assert typos(3) == typos(3) != typos(4)


def judged(home: Home, fitted: Model, chosen: list[odd.Variant]) -> list[dict]:
    return odd.judged(home.dense, odd.variant_losses(home.dense, chosen), fitted, chosen, seed=0)


def test_each_variant_is_judged_as_by_itself(home):
    chosen = [variant for name, variant in variants(home).items() if name in ("unchanged", "numbers", "long")]
    for row, variant in zip(judged(home, home.fitted, chosen), chosen, strict=True):
        dense, fitted = (document_losses(of, variant.windows, CONTEXT) for of in (home.dense, home.fitted))
        assert row["percent"] == pytest.approx(rise(dense, fitted, seed=0).percent)
        assert row["dense"] == pytest.approx(dense.perplexity)
        assert row["tokens"] == sum(len(window) - 1 for window in variant.windows)
        assert 0 < row["agreement"]["share"] < 1


def test_a_model_with_a_vocabulary_of_its_own_reads_the_same_texts(home):
    tokenizer = load_tokenizer(home.dense.directory)
    vocabulary = needed(home.dense.directory, ids_of(tokenizer, CORPUS))
    reduced = scaled(home.dense, home.folder / "reduced", vocabulary)
    chosen = list(variants(home).values())[:2]
    whole, fewer = (judged(home, model, chosen) for model in (home.fitted, reduced))
    assert [row["dense"] for row in whole] == [row["dense"] for row in fewer]
    assert [row["tokens"] for row in whole] == [row["tokens"] for row in fewer]


def test_rungs_are_judged_but_those_that_removed_nothing_or_draw_pictures(home, tmp_path, monkeypatch):
    def run(kind: object) -> SimpleNamespace:
        setup = SimpleNamespace(
            kind=kind, model=home.dense, request=SimpleNamespace(seed=0), workload=SimpleNamespace(context=CONTEXT)
        )
        journal = open_journal(tmp_path / type(kind).__name__, {}, False, False)
        samples = SimpleNamespace(evaluation=home.texts)
        parts = SimpleNamespace(evaluation={})
        return SimpleNamespace(setup=setup, journal=journal, progress=Silent(), samples=samples, parts=parts)

    def candidate(records: tuple) -> SimpleNamespace:
        return SimpleNamespace(model=home.fitted, deployed=home.fitted, records=records)

    language, images, read = run(Language()), run(Images()), odd.variant_losses
    of_dense = []
    monkeypatch.setattr(odd, "variant_losses", lambda model, *rest: of_dense.append(model) or read(model, *rest))
    assert odd.robustness(images, [candidate(({},))]) == [None]
    nothing, one, other = odd.robustness(language, [candidate(()), candidate(({},)), candidate(({},))])
    assert nothing is None
    assert one == other
    assert [row["name"] for row in one] == list(variants(home))
    assert of_dense == [home.dense]  # which all rungs share
    assert set(language.journal.seconds) - {"all else"} == {
        "dense-odd-input",
        "odd input of rung 1",
        "odd input of rung 2",
    }
