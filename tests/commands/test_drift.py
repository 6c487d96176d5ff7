"""`edgeprune drift` on a real bundle, by the real command line: distances, cost, advice, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import edgeprune
from edgeprune.errors import InputError
from edgeprune.evaluate.drift import sketches
from edgeprune.evaluate.perplexity import document_losses, rise
from edgeprune.model.load import load_model
from edgeprune.pipeline.sketch import SKETCH_FILE, read_sketch
from tests.support.bundles import copy_of, rewrite
from tests.support.checkpoints import save_llama
from tests.support.commands import run

OLD = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away", "from"]
NEW = "0123456789 {}[]() == != #"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A bundle for a device that is not here, so that nothing is measured."""
    home = tmp_path_factory.mktemp("home")
    shape = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "intermediate_size": 2048}
    save_llama(home / "model", num_hidden_layers=2, initializer_range=0.05, **shape)
    (home / "text.jsonl").write_text(lines(words_of(1, 120)))
    words = ("--device", "jetson-orin", "--memory", "90%", "--calibration", home / "text.jsonl", "--weights", "float")
    small = ("--samples", "8", "--length", "32", "--prompt", "16", "--context", "64")
    made = run("fit", home / "model", *words, "--method", "magnitude", "--output", home / "bundle", *small)
    assert made.returncode == 0, made.stderr
    return home / "bundle"


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    folder, generator = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    other = ["".join(generator.choice(list(NEW), 300)) for _ in range(12)]
    for name, documents in (("other", other), ("more", words_of(2, 80))):
        (folder / f"{name}.jsonl").write_text(lines(documents))
    return {name: folder / f"{name}.jsonl" for name in ("other", "more")}


def words_of(seed: int, count: int) -> list[str]:
    """Documents of a few words in any order."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(OLD, 8)) for _ in range(count)]


def lines(documents: list[str]) -> str:
    return "\n".join(json.dumps({"text": document}) for document in documents)


@pytest.mark.slow
def test_the_bundle_holds_what_the_dense_model_reads_of_the_calibration_samples(bundle):
    sketch = read_sketch(bundle / "rungs/0" / SKETCH_FILE)
    assert sketch.length == 32
    assert sketch.moments.shape == (4, 8, 136)
    assert f"rungs/0/{SKETCH_FILE}" in json.loads((bundle / "manifest.json").read_text())["sha256"]


def test_the_report_of_the_fit_judges_odd_input(bundle):
    robustness = edgeprune.load_bundle(bundle).report.robustness
    assert [variant.name for variant in robustness.variants][:2] == ["unchanged", "typos"]
    assert all(variant.tokens > 0 for variant in robustness.variants)


def test_texts_of_another_kind_are_far_and_those_of_the_same_near(bundle, texts):
    other, more = (edgeprune.drift(bundle, texts=texts[name], samples=8).report for name in ("other", "more"))
    assert other.distance_percent > 3 * more.distance_percent
    assert other.drifted
    assert other.verdict.startswith("Drift: ")
    assert not more.drifted
    assert len(other.modules) == 4
    assert len(other.covering) == other.samples == 8


def test_distance_and_cost_are_those_of_the_models_themselves(bundle, texts):
    report = edgeprune.drift(bundle, texts=texts["other"], samples=6, seed=5).report
    dense, small = load_model(str(bundle.parent / "model")), load_model(str(bundle / "rungs/0/model"))
    from edgeprune.commands.drift import _rows
    from edgeprune.pipeline.documents import read

    rows = _rows(read(texts["other"]), dense, 6, 32, 5)
    old, new = read_sketch(bundle / "rungs/0" / SKETCH_FILE).moments, sketches(dense, rows.ids)
    gaps = []
    for a, b in zip(old.astype(float), new.astype(float), strict=True):

        def within(x: np.ndarray) -> float:
            return ((x @ x.T).sum() - (x**2).sum()) / (len(x) * (len(x) - 1))

        gaps.append((within(a) + within(b) - 2 * (a @ b.T).mean()) / (a.mean(axis=0) ** 2).sum())
    assert report.distance_percent == pytest.approx(100 * np.sqrt(np.mean(gaps)), rel=1e-4)
    losses = [document_losses(model, rows.ids, 32) for model in (dense, small)]
    assert report.cost.rise_percent == pytest.approx(rise(*losses, seed=5).percent)
    assert report.cost.documents == 6
    assert 0 <= report.cost.agreement.percent <= 100


def test_each_sample_names_the_documents_that_it_holds(bundle, texts):
    from edgeprune.commands.drift import _rows
    from edgeprune.pipeline.documents import read

    model = load_model(str(bundle / "rungs/0/model"))
    from edgeprune.model.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model.directory)
    rows = _rows(read(texts["more"]), model, 8, 32, 0)
    documents = read(texts["more"]).documents
    for ids, names in zip(rows.ids, rows.names, strict=True):
        parts = np.split(ids, np.flatnonzero(ids == tokenizer.eos_token_id))
        held = [text for part in parts if (text := tokenizer.decode(part, skip_special_tokens=True))]
        assert len(names) - 1 <= len(held) <= len(names)  # of one there may be its end alone
        whole = [of for of in documents if any(of.startswith(name) for name in names)]
        assert all(any(text in of for of in whole) for text in held)


def test_since_reads_the_calibration_data_again(bundle, texts):
    text = bundle.parent / "text.jsonl"
    report = edgeprune.drift(bundle, texts=texts["more"], since=text, samples=8).report
    assert report.since == str(text)
    assert report.calibration_samples >= 8
    assert not report.drifted


def test_the_command_line_prints_verdict_modules_cost_and_advice(bundle, texts):
    printed = run("drift", bundle, "--texts", texts["other"], "--samples", "8")
    assert printed.returncode == 0, printed.stderr
    for part in ("Drift: ", "layer 1 mlp", "same next token", "of the fit"):
        assert part in printed.stdout, printed.stdout
    document = json.loads(run("drift", bundle, "--texts", texts["other"], "--samples", "8", "--json").stdout)
    again = edgeprune.drift(bundle, texts=texts["other"], samples=8).report
    assert document == json.loads(again.model_dump_json())


def test_without_the_dense_model_the_fitted_one_reads_both_texts(bundle, texts, tmp_path):
    copy = copy_of(bundle, tmp_path / "bundle")
    toml = (copy / "run.toml").read_text().replace(str(bundle.parent / "model"), "/no/such/model")
    rewrite(copy, "run.toml", toml.encode())
    with pytest.raises(InputError) as caught:
        edgeprune.drift(copy, texts=texts["other"], samples=8)
    assert "name it with --model" in caught.value.message
    assert "--since" in caught.value.remedy
    report = edgeprune.drift(copy, texts=texts["other"], since=bundle.parent / "text.jsonl", samples=8).report
    assert (report.reader, report.cost) == ("fitted", None)
    assert "name it with --model" in report.no_cost
    assert "--calibration FOLDER" in report.steps[0].command
    assert report.steps[0].command.startswith("edgeprune fit --config ")
    named = edgeprune.drift(copy, texts=texts["other"], samples=8, model=bundle.parent / "model").report
    assert named.cost is not None


def test_what_cannot_be_compared_is_refused_with_a_remedy(bundle, texts, tmp_path):
    copy = copy_of(bundle, tmp_path / "bundle")
    (tmp_path / "short.txt").write_text("too little")

    def refused(message: str, remedy: str, folder: Path = bundle, **options: object) -> None:
        with pytest.raises(InputError) as caught:
            edgeprune.drift(folder, **{"texts": texts["more"], **options})
        assert message in caught.value.message
        assert remedy in caught.value.remedy

    refused("no such file or folder of samples", "Give UTF-8 text", texts=tmp_path / "none")
    refused("fewer than 4 samples of 32", "Add text", texts=tmp_path / "short.txt")
    refused("--samples 3 is less than 4", "at least 4", samples=3)
    refused("is not the model that", "Leave --model out", model=bundle / "rungs/0/model")
    refused("is not a bundle", "edgeprune fit", folder=tmp_path)
    rewrite(copy, f"rungs/0/{SKETCH_FILE}", b"no sketch")
    refused("cannot be read", "--since PATH", folder=copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"][f"rungs/0/{SKETCH_FILE}"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / "rungs/0" / SKETCH_FILE).unlink()
    refused("holds no sketch of its calibration data", "--since PATH", folder=copy)
    shutil.rmtree(copy)
