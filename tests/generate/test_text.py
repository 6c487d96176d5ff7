"""Text of a model: what samples begin with, how they are drawn, and prompts in a chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.errors import InputError
from edgeprune.generate.text import BATCH, generate_documents, opening_of, prompt_ids, sample_text, stream_text
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.ondevice.onnxruntime import GRAPH_FILE, GraphRunner
from edgeprune.ondevice.sampling import generate
from edgeprune.progress import Forwarded, Silent
from tests.support.checkpoints import save_tokenizer
from tests.support.graph_models import llama
from tests.support.reference import decoder_of, weights_of

VARIANT = GraphVariant("onnxruntime", "last")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
END = 0


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = llama(True, vocab_size=257), tmp_path_factory.mktemp("graph")
    return write_graphs(decoder_of(model.config), weights_of(model), folder, "fp32", [VARIANT]).graphs[VARIANT]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path)
    return tmp_path


def configured(folder: Path, **changes: object) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_samples_are_drawn_by_seed_a_batch_at_a_time(graph: Path, folder: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    progress = Forwarded(lambda *step: steps.append(step))
    samples = generate_documents(graph, folder, 2 * BATCH, 6, 3, progress)
    assert samples.shape == (2 * BATCH, 6)
    assert (samples[:, 0] == END).all()
    assert len({tuple(row) for row in samples.tolist()}) == 2 * BATCH
    assert steps[0] == ("generate samples", 0, 10)
    assert steps[-1] == ("generate samples", 10, 10)
    np.testing.assert_array_equal(generate_documents(graph, folder, BATCH, 6, 3, Silent()), samples[:BATCH])
    assert (generate_documents(graph, folder, BATCH, 6, 4, Silent()) != samples[:BATCH]).any()


@pytest.mark.parametrize(
    ("changes", "length", "opening"),
    [
        ({}, 4, [END]),
        ({"bos_token": "a"}, 4, ["a"]),
        ({"bos_token": None}, 4, [END]),
        ({"chat_template": TEMPLATE}, 12, list("<user>")),
        ({"chat_template": TEMPLATE}, 6, ["<"]),
        ({"chat_template": "a template without the messages"}, 4, [END]),
    ],
    ids=["bos", "another bos", "eos", "a user's turn", "no room", "no mark"],
)
def test_a_sample_begins_as_a_user_would(graph: Path, folder: Path, changes, length: int, opening: list) -> None:
    tokenizer = load_tokenizer(configured(folder, **changes))
    expected = [tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else token for token in opening]
    samples = generate_documents(graph, folder, 2, length, 0, Silent())
    assert samples.shape == (2, length)
    assert samples[:, : len(expected)].tolist() == [expected] * 2


def test_without_a_token_to_begin_with_the_users_own_texts_are_asked_for(graph: Path, folder: Path) -> None:
    configured(folder, bos_token=None, eos_token=None)
    with pytest.raises(InputError, match="neither a begin nor an end token") as caught:
        generate_documents(graph, folder, 1, 4, 0, Silent())
    assert caught.value.remedy == "Give --calibration PATH."


def test_a_prompt_is_the_users_turn_where_there_is_a_template(folder: Path) -> None:
    plain = load_tokenizer(folder)
    assert plain.decode(prompt_ids(plain, "hello", 257, pytest.fail)) == "hello"
    chat = load_tokenizer(configured(folder, chat_template=TEMPLATE))
    assert chat.decode(prompt_ids(chat, "hello", 257, pytest.fail)) == "<user>hello\n<assistant>"


def test_an_answer_stays_within_the_context_and_is_drawn_by_seed(graph: Path, folder: Path) -> None:
    answers = [sample_text(graph, folder, "a long prompt " * 9, 20, 500, seed) for seed in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2]
    assert len(answers[0]) <= 10  # half of the context is the prompt's; a token is a letter at most


def bundled(folder: Path, context: int) -> Path:
    """What a bundle needs before its graph is opened."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "rungs" / "0").mkdir(parents=True)
    save_tokenizer(folder / "tokenizer")
    (folder / "manifest.json").write_text(json.dumps({"sha256": {}, "engine": "onnxruntime"}))
    (folder / "report.json").write_text(json.dumps({"workload": {"batch": 1, "prompt": 1, "context": context}}))
    return folder


def streamed(bundle: Path, prompt: str, count: int | None = 5, note: Callable = pytest.fail) -> str:
    return "".join(stream_text(bundle, prompt, count, 0.0, 0, 1.0, 0, note))


def test_a_bundle_streams_what_its_graph_continues(tmp_path: Path) -> None:
    bundle, model = bundled(tmp_path, 32), llama(True, vocab_size=257)
    folder = bundle / "rungs" / "0" / "onnx"
    write_graphs(decoder_of(model.config), weights_of(model), folder, "fp32", [VARIANT])
    (bundle / "onnx").write_text("rungs/0/onnx")  # the link, as git writes it where there are none
    tokenizer = load_tokenizer(bundle / "tokenizer")
    prompt = tokenizer("once")["input_ids"]
    steps = generate(GraphRunner(folder / GRAPH_FILE, 1, 32), [prompt], 12, temperature=0.0)
    ids = [int(tokens[0]) for tokens in steps]
    texts = [tokenizer.decode(ids[: count + 1]) for count in range(12)]
    expected = [text for text in texts if not text.endswith("\ufffd")]  # half a character is held back
    assert 0 < len(expected) < 12
    assert END not in ids
    assert streamed(bundle, "once", 12) == expected[-1]
    # More than the context has room for is cut with a word where it was asked for.
    notes: list[str] = []
    assert streamed(bundle, "once", 1000, notes.append) == streamed(bundle, "once", None)
    assert notes == ["no more than 28 new tokens: the bundle's context of 32 holds prompt and answer"]
    assert streamed(bundle, "caf\udce9", 3)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(bundle / "tokenizer")
    with pytest.raises(InputError, match=r"the prompt holds tokens .* of 257: <think>"):
        streamed(bundle, "<think>")


def test_a_prompt_that_fills_the_context_and_a_bundle_of_pictures_are_refused(tmp_path: Path) -> None:
    bundle, model = bundled(tmp_path, 4), llama(True, vocab_size=257)
    write_graphs(decoder_of(model.config), weights_of(model), bundle / "rungs" / "0" / "onnx", "fp32", [VARIANT])
    with pytest.raises(InputError, match="the prompt of 4 tokens exceeds the bundle's context of 4"):
        streamed(bundle, "once")
    (bundle / "codec").mkdir()
    with pytest.raises(InputError, match="is the bundle of an image generator") as caught:
        streamed(bundle, "once")
    assert "--class N" in caught.value.remedy


REFUSING = "{{ raise_exception('no lone user') }}"


@pytest.mark.parametrize(
    "template", [REFUSING, "{% for m in messages %}", [{"name": "rag", "template": TEMPLATE}], "<new>" + TEMPLATE]
)
def test_where_the_template_refuses_a_lone_user_it_is_said_and_plain_text_taken(
    graph: Path, folder: Path, template: object
) -> None:
    changes = {"chat_template": template, "extra_special_tokens": ["<new>"]}  # a token that the model has no row for
    tokenizer, notes = load_tokenizer(configured(folder, **changes)), []
    assert opening_of(tokenizer, 257, notes.append) == [END]
    assert prompt_ids(tokenizer, "hello", 257, notes.append) == tokenizer("hello")["input_ids"]
    assert len(notes) == 2
    assert all("chat template" in note for note in notes)
    assert len(sample_text(graph, folder, "hello", 20, 4, 0)) <= 4


def test_a_template_that_writes_nothing_is_not_taken(folder: Path) -> None:
    tokenizer, notes = load_tokenizer(configured(folder, chat_template="{# nothing #}")), []
    assert opening_of(tokenizer, 257) == [END]
    assert tokenizer.decode(prompt_ids(tokenizer, "hello", 257, notes.append)) == "hello"
    assert notes == ["the prompt is continued as plain text: the model's chat template writes nothing"]


def test_an_opening_of_tokens_without_an_embedding_is_not_taken(folder: Path) -> None:
    tokenizer, notes = load_tokenizer(configured(folder, chat_template=TEMPLATE)), []
    assert opening_of(tokenizer, 10, notes.append) == [END]
    assert "embedding of 10" in notes[0]


def test_without_a_token_to_begin_with_samples_begin_as_the_users_own(graph: Path, folder: Path) -> None:
    configured(folder, bos_token=None, eos_token=None)
    given = np.array([[7, 8], [9, 8]])
    samples = generate_documents(graph, folder, BATCH + 3, 4, 0, Silent(), given)
    assert samples.shape == (BATCH + 3, 4)
    assert samples[:, 0].tolist() == ([7, 9] * BATCH)[: BATCH + 3]
