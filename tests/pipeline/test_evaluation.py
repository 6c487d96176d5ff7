"""A candidate against the dense model: the dense part once, the same windows and prompts in any vocabulary."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from edgeprune.engine.onnx.graph import ONNXRUNTIME_GRAPH, write_graphs
from edgeprune.evaluate.perplexity import document_losses, rise
from edgeprune.model.cache import cache_scales, with_cache
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.save import save_checkpoint
from edgeprune.model.tokens.vocabulary import Vocabulary, needed, retokenized
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.onnxruntime import GRAPH_FILE
from edgeprune.pipeline.evaluation import Evaluator
from edgeprune.pipeline.journal import open_journal
from edgeprune.pipeline.kind import Language
from edgeprune.pipeline.results import Samples
from edgeprune.pipeline.sharing import Dependencies
from edgeprune.precision import CACHE_FORMATS
from edgeprune.profiles import load_profile
from edgeprune.progress import Silent
from tests.support.checkpoints import save_llama
from tests.support.vocabularies import TEXT, byte_level

CONTEXT = 40
TEXTS = {"manual": TEXT[1200:3600].splitlines(), "notes": TEXT[3600:4400].splitlines()}


@dataclass(frozen=True)
class Home:
    model: Model
    plain: Path
    tokens: dict[str, list[np.ndarray]]
    folder: Path

    def evaluator(self, folder: Path, resume: bool = False, tokens: dict | None = None) -> Evaluator:
        setup = SimpleNamespace(
            model=self.model,
            workload=Workload(1, 16, CONTEXT),
            request=SimpleNamespace(seed=0),
            length=32,
            kind=Language(),
            profile=load_profile("rtx-4090"),
            tasks=(),
            fingerprint=defaultdict(str),
        )
        samples = Samples(np.zeros((1, 2)), None, tokens or self.tokens, self_generated=False)
        journal = open_journal(folder, {}, resume, False)
        journal.close()  # the test may go on with it
        return Evaluator(setup, journal, Silent(), samples, self.plain, Dependencies(setup))

    def prompts(self) -> list[np.ndarray]:
        """Sixteen beginnings of one length, half of the context at most, evenly from all documents that have it."""
        documents = [document for of in self.tokens.values() for document in of]
        length = min(CONTEXT - 20, int(np.median([len(document) for document in documents])))
        long = [document[:length] for document in documents if len(document) >= length]
        return [long[round(i)] for i in np.linspace(0, len(long) - 1, 16)]


def write(model: Model, folder: Path) -> Path:
    write_graphs(model.decoder, model.weights, folder, "fp32", [ONNXRUNTIME_GRAPH], CONTEXT)
    return folder


def candidate(model: Model, folder: Path) -> SimpleNamespace:
    """As the loop's: the fp32 graphs stand beside those of the device's precision."""
    write(model, folder / "onnx-fp32")
    graph = folder / "onnx-fp32" / GRAPH_FILE
    return SimpleNamespace(model=model, deployed=model, decoder=model.decoder, runnable_graph=graph)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    folder = tmp_path_factory.mktemp("home")
    save_llama(folder / "model", vocab_size=640)
    byte_level(folder / "model")
    model = load_model(str(folder / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokens = {
        name: [np.array(tokenizer(line)["input_ids"]) for line in lines if len(line) > 8]
        for name, lines in TEXTS.items()
    }
    return Home(model, write(model, folder / "plain"), tokens, folder)


def checkpoint(home: Home, name: str, scale: float = 1.0, vocabulary: Vocabulary | None = None) -> Model:
    """The model with its MLPs' outputs scaled, and with a vocabulary of its own."""
    decoder = home.model.decoder
    tensors = ((key, home.model.weights[key] * (scale if key.endswith("mlp.down") else 1)) for key in decoder.shapes())
    target = decoder if vocabulary is None else decoder.with_vocabulary(vocabulary.size)
    save_checkpoint(target, tensors, home.model, home.folder / name, vocabulary)
    return load_model(str(home.folder / name))


def test_the_dense_model_against_itself_is_the_same_in_everything(home, tmp_path):
    quality = home.evaluator(tmp_path / "journal").quality("0", candidate(home.model, tmp_path))
    for name, text in quality.texts.items():
        assert text["percent"] == text["low"] == text["high"] == 0
        assert text["dense"] == text["fitted"]
        agreement = text["agreement"]
        assert agreement["share"] == agreement["low"] == agreement["high"] == 1
        assert agreement["places"] == text["tokens"]
        assert agreement["documents"] == agreement["of"] == len(home.tokens[name])
    assert [of["tokens"] for of in quality.answers["identical"]] == [1, 2, 4, 8, 16]
    assert {of["same"] for of in quality.answers["identical"]} == {16}
    assert quality.answers["device"].endswith("threads, fp32")
    assert quality.dense_sample == quality.fitted_sample


def test_another_model_is_compared_place_by_place(home, tmp_path):
    other = checkpoint(home, "other", scale=0.3)
    quality = home.evaluator(tmp_path / "journal").quality("0", candidate(other, tmp_path))
    for name, documents in home.tokens.items():
        dense, fitted = (document_losses(model, documents, 256) for model in (home.model, other))
        same = [
            old == new
            for olds, news in zip(dense.likeliest, fitted.likeliest, strict=True)
            for old, new in zip(olds, news, strict=True)
        ]
        text = quality.texts[name]
        assert 0 < text["agreement"]["share"] < 1
        assert text["agreement"]["share"] == pytest.approx(np.concatenate(same).mean())
        assert text["agreement"]["low"] <= text["agreement"]["share"] <= text["agreement"]["high"]
        assert text["percent"] == pytest.approx(rise(dense, fitted, seed=0).percent)
    answers = {of["tokens"]: of["same"] for of in quality.answers["identical"]}
    assert answers == {tokens: greedy(home, other)[:, tokens - 1].sum() for tokens in answers}


def greedy(home: Home, other: Model) -> np.ndarray:
    """Whether the answers of transformers' generate are the same up to each token, (prompts, tokens)."""
    from transformers import AutoModelForCausalLM

    prompts = torch.from_numpy(np.stack(home.prompts()))
    answers = [
        AutoModelForCausalLM.from_pretrained(model.directory).generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=20, do_sample=False
        )[:, prompts.shape[1] :]
        for model in (home.model, other)
    ]
    shortest = min(of.shape[1] for of in answers)
    return np.logical_and.accumulate((answers[0][:, :shortest] == answers[1][:, :shortest]).numpy(), axis=1)


def test_few_documents_are_asked_in_several_places(home, tmp_path):
    long = np.concatenate(home.tokens["manual"])[:600]
    evaluator = home.evaluator(tmp_path / "journal", tokens={"one": [long]})
    evaluator.quality("0", candidate(home.model, tmp_path))
    prompts = evaluator.journal.stage("dense answers", pytest.fail)["prompts"]
    assert prompts == [long[start : start + 20].tolist() for start in (0, 256, 512)]


def test_the_dense_part_is_computed_once_and_survives_a_kill(home, tmp_path, monkeypatch):
    evaluator, chosen = home.evaluator(tmp_path / "journal"), candidate(home.model, tmp_path)
    first = evaluator.quality("0", chosen)
    seen = []
    original = Evaluator._losses
    monkeypatch.setattr(Evaluator, "_losses", lambda self, model, of: seen.append(model) or original(self, model, of))
    again = home.evaluator(tmp_path / "journal", resume=True)
    assert again.quality("0", chosen) == first
    assert not seen
    second = again.quality("1", candidate(checkpoint(home, "smaller", 0.8), tmp_path / "1"))
    assert [model.directory.name for model in seen] == ["smaller"]
    assert second.dense_sample == first.dense_sample
    lines = (tmp_path / "journal" / "journal.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["stage"] for line in lines] == [
        "dense-evaluation",
        "dense answers",
        "evaluation 0",
        "evaluation 1",
    ]


def test_a_vocabulary_of_its_own_changes_the_spelling_and_not_the_text(home, tmp_path):
    """The tokens of the first text alone: it is read as before; the other one is spelled and costs what it costs."""
    used = np.concatenate(home.tokens["manual"])
    vocabulary = needed(home.model.directory, used)
    assert vocabulary.size < home.model.decoder.vocab_size
    reduced = checkpoint(home, "reduced", vocabulary=vocabulary)
    quality = home.evaluator(tmp_path / "journal").quality("0", candidate(reduced, tmp_path))
    known, foreign = quality.texts["manual"], quality.texts["notes"]
    assert known["agreement"]["places"] == known["tokens"]
    assert known["agreement"]["documents"] == known["agreement"]["of"]
    assert known["percent"] < 0  # the same logits over fewer tokens
    dense = document_losses(home.model, home.tokens["manual"], 256)
    kept = np.isin(np.concatenate([np.concatenate(of) for of in dense.likeliest]), vocabulary.kept)
    assert known["agreement"]["share"] == pytest.approx(kept.mean())  # where the likeliest is kept it stays so
    assert foreign["tokens"] == sum(len(document) - 1 for document in home.tokens["notes"])
    assert 0 < foreign["agreement"]["places"] < foreign["tokens"]
    assert foreign["fitted"] == pytest.approx(foreign["dense"] * (1 + foreign["percent"] / 100))
    assert foreign["fitted"] > foreign["dense"]  # more tokens for the same text
    prompts = retokenized(home.prompts(), home.model.directory, reduced.directory)
    assert quality.answers["prompt_tokens"] == len(home.prompts()[0])
    assert quality.answers["identical"][0]["answers"] == sum(len(prompt) <= CONTEXT - 20 for prompt in prompts)


def test_a_cache_in_codes_is_evaluated_as_it_is_deployed(home: Home, tmp_path: Path) -> None:
    """Half of a channel's range is cut off, so that the difference is plain: on a GPU's profile by the walk."""
    form = CACHE_FORMATS["int8"]
    ids = torch.from_numpy(np.stack([document[:24] for document in home.tokens["notes"] if len(document) >= 24]))
    scales = {name: scale / 2 for name, scale in cache_scales(home.model, ids, form).items()}
    chosen = candidate(home.model, tmp_path / "other")
    chosen.deployed = with_cache(home.model, form, scales)
    chosen.decoder = chosen.deployed.decoder
    text = home.evaluator(tmp_path / "run").quality("0", chosen).texts["notes"]
    expected = document_losses(chosen.deployed, home.tokens["notes"], 256)
    assert text["fitted"] == pytest.approx(expected.perplexity)
    assert text["fitted"] != pytest.approx(text["dense"], rel=1e-4)
