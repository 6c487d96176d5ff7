"""The harness's own model of transformers answers the same questions by the same tasks."""

import json

import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from edgeprune.errors import InputError
from edgeprune.evaluate.harness import HarnessModel, read_tokens, scores
from edgeprune.evaluate.likelihoods import ModelLikelihoods
from edgeprune.model.load import load_model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.pipeline.task_scores import load_tasks
from tests.support.checkpoints import save_llama
from tests.support.questions import question_rows, write_questions, write_task

CAPACITY = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    save_llama(folder / "model")
    write_questions(folder / "own.jsonl")
    write_task(folder / "letters.yaml", folder / "own.jsonl")
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    return HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", max_length=CAPACITY, batch_size=4)


@pytest.fixture(scope="module")
def ours(folder):
    model = load_model(str(folder / "model"))
    return HarnessModel(ModelLikelihoods(model, CAPACITY), load_tokenizer(model.directory))


def asked(kind, *texts):
    return [Instance(kind, {}, arguments, number) for number, arguments in enumerate(texts)]


def test_likelihoods_are_those_of_the_harness(ours, theirs):
    """Also after nothing, after a space, and where the context is too long."""
    pairs = [("one two", " three"), ("", "four"), ("five ", "six"), ("seven " * 30, " eight"), ("one two", " nine")]
    found, expected = (model.loglikelihood(asked("loglikelihood", *pairs)) for model in (ours, theirs))
    for (nats, is_greedy), (true_nats, true_greedy) in zip(found, expected, strict=True):
        assert nats == pytest.approx(true_nats, rel=1e-4)
        assert is_greedy == true_greedy
    assert ours.cut == 1


def test_whole_texts_are_those_of_the_harness(ours, theirs):
    texts = [("a text of one window",), ("a longer text " * 12,)]
    found, expected = (model.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)) for model in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["own.jsonl", "letters.yaml"])
def test_scores_of_every_question_are_those_of_the_harness(folder, ours, theirs, name):
    """A file's own questions, and a task as the harness has them, with an example before each question."""
    (task,) = load_tasks(str(folder / name), print)
    found = scores(task, ours, None)
    for part in task.parts.values():
        part.set_fewshot_seed(1234)  # as the harness's own command does
    samples = evaluate(theirs, {"tasks": dict(task.parts)}, bootstrap_iters=0)["samples"]
    expected = [sample[task.metric] for sample in samples[task.name]]
    assert found.tolist() == expected
    assert len(expected) == len(question_rows()) and 0 < sum(expected) < len(expected)
    assert scores(task, ours, 3).tolist() == expected[:3]


def test_the_tokens_of_a_task_are_a_context_and_the_answers_of_each_question(folder):
    (task,), tokenizer = load_tasks(str(folder / "own.jsonl"), print), load_tokenizer(folder / "model")
    texts = [
        [f"Question: {row['question']}\nAnswer:", *(f" {one}" for one in row["choices"])] for row in question_rows()
    ]
    counts = [sum(len(tokenizer(text)["input_ids"]) for text in of_question) for of_question in texts]
    assert read_tokens(task, tokenizer, None) == pytest.approx(sum(counts), rel=0.1)
    assert read_tokens(task, tokenizer, 3) == pytest.approx(3 / len(counts) * sum(counts), rel=0.1)


def test_a_task_is_known_by_its_questions(folder, tmp_path):
    rows = question_rows()
    write_questions(tmp_path / "own.jsonl")
    (first,), (same,) = (load_tasks(str(place / "own.jsonl"), print) for place in (folder, tmp_path))
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, [*rows[:-1], rows[0]])))
    (other,) = load_tasks(str(tmp_path / "own.jsonl"), print)
    assert first.digest == same.digest != other.digest
    assert (first.name, first.metric) == ("own", "acc_norm")


def test_questions_of_the_hub_are_told_before_they_are_loaded(tmp_path, monkeypatch):
    """Without a connection the load fails; what matters is what was said before."""
    write_task(tmp_path / "base.yaml", None)
    (tmp_path / "far.yaml").write_text("include: base.yaml\ntask: far\nprocess_docs: !function own.process\n")
    (tmp_path / "own.py").write_text("def process(documents):\n    return documents\n")
    monkeypatch.setattr("datasets.load_dataset", _no_connection)
    notes = []
    with pytest.raises(InputError, match="task far cannot be loaded: no connection") as caught:
        load_tasks(str(tmp_path / "far.yaml"), notes.append)
    assert notes == ["task far: its questions come from the Hugging Face hub (someone/questions), if they are not "
                     "there already"]  # fmt: skip
    assert "Download them" in caught.value.remedy


def _no_connection(*_, **__):
    raise ConnectionError("no connection")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{choices[0]}}"},
            "is of the kind generate_until",
        ),
        ({"metric_list": [{"metric": "brier_score", "higher_is_better": False}]}, "has no score of each question"),
        ({"doc_to_text": "{{question"}, "cannot be loaded"),
    ],
)
def test_tasks_that_cannot_be_scored_are_refused(folder, tmp_path, changes, message):
    write_task(tmp_path / "task.yaml", folder / "own.jsonl", **changes)
    with pytest.raises(InputError, match=message):
        load_tasks(str(tmp_path / "task.yaml"), print)


def test_two_tasks_of_one_name_are_refused(folder, tmp_path):
    write_questions(tmp_path / "own.jsonl")
    with pytest.raises(InputError, match="two of the tasks are named own"):
        load_tasks(f"{folder / 'own.jsonl'},{tmp_path / 'own.jsonl'}", print)


def test_an_answer_beyond_the_context_is_refused(folder):
    model = load_model(str(folder / "model"))
    small = HarnessModel(ModelLikelihoods(model, 4), load_tokenizer(model.directory))
    with pytest.raises(InputError, match="an answer of 6 tokens exceeds the context of 4"):
        small.loglikelihood(asked("loglikelihood", ("one", " seven")))
