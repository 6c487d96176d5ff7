"""samples(): from files of every kind to the samples of a fit, with a model and without, and all that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import edgeprune
from edgeprune.errors import InputError
from edgeprune.model.load import load_model
from edgeprune.pipeline.documents import read
from edgeprune.pipeline.request import request_of
from edgeprune.pipeline.samples import pack_texts, read_texts
from tests.support.checkpoints import save_llama
from tests.support.commands import run

WORDS = ["river", "stone", "lamp", "cloud", "paper", "green", "winter", "music", "garden", "window", "letter"]
JAPANESE = [
    "設定",
    "方法",
    "文書",
    "接続",
    "画面",
    "時間",
    "世界",
    "言葉",
    "説明",
    "記録",
    "手紙",
    "場所",
    "部屋",
    "道路",
    "天気",
    "音楽",
]


def prose(seed: int, count: int = 40) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, size=count))


def japanese(seed: int) -> str:
    chosen = np.random.default_rng(seed).choice(JAPANESE, size=24)
    return "".join(f"{one}は{other}を{third}します。" for one, other, third in chosen.reshape(-1, 3))


@pytest.fixture
def data(tmp_path):
    """A log, chats, a table and a folder: with equal and nearly equal documents, and what is to be masked."""
    folder = tmp_path / "data"
    (folder / "notes").mkdir(parents=True)
    (folder / "server.log").write_text("\n\n".join(f"The server says: {prose(n)}" for n in range(12)))
    (folder / "notes" / "long.txt").write_text(" ".join(prose(100 + n) for n in range(30)))
    (folder / "notes" / "ja.txt").write_text("\n\n".join(map(japanese, range(8))))
    chats = [
        {"messages": [{"role": "user", "content": f"{prose(300 + n)} from user{n}@example.org"}]} for n in range(8)
    ]
    chats += [chats[0], {"messages": [{"role": "user", "content": f"{prose(301).upper()} from another@example.org"}]}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    rows = "".join(f'{n},"Call +49 30 1234567{n} about {prose(400 + n, 15)} for Ann Smith"\n' for n in range(6))
    (tmp_path / "answers.csv").write_text(f"id,Answer\n{rows}")
    (tmp_path / "names.txt").write_text("Ann Smith\n")
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder, num_hidden_layers=2)
    return folder


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_without_a_model_all_else_is_done(data):
    output, held_out = data / "samples.jsonl", data / "held-out.jsonl"
    seen = []
    report = edgeprune.samples(
        [data / "data", data / "chats.jsonl"],
        output=output,
        held_out=held_out,
        count=8,
        length=64,
        progress=lambda *step: seen.append(step),
    ).report
    lines, others = records(output), records(held_out)
    assert len(lines) == len(report.selection.chosen)
    assert len(others) == len(report.selection.held_out) > 0
    # Masked, nowhere to be found, and counted.
    assert "example.org" not in output.read_text() + held_out.read_text()
    assert report.collection.masked == {"emails": 9}  # the equal one was read once
    # Duplicates: a chat that is equal, and one in capitals.
    assert (report.collection.exact, report.collection.near) == (1, 1)
    # Each line tells its origin, and a part where it begins.
    places = [line["provenance"]["source"] for line in lines + others]
    assert len(set(places)) == len(places)
    assert any(place.startswith("data/notes/long.txt, part 1, from character ") for place in places)
    assert all(line["provenance"]["role"] == "calibration" for line in lines)
    whole = read(data / "data" / "notes" / "long.txt").documents[0]
    for line in lines + others:
        source = line["provenance"]["source"]
        if "long.txt, part 1," in source:
            start = int(source.rpartition(" ")[2]) - 1
            assert whole[start:].lstrip().startswith(line["text"])
    # Sources and languages have their shares of what was chosen.
    groups = {(group.source, group.language): group for group in report.selection.groups}
    assert {"data", "chats.jsonl"} == {source for source, _ in groups}
    assert ("data", "ja") in groups
    for group in groups.values():
        assert group.chosen_tokens >= min(group.tokens / 2, group.share * report.selection.tokens / 2)
    assert report.selection.tokens >= 8 * 64
    assert ("find near duplicates", 0) in {step[:2] for step in seen}


def test_with_a_model_the_choice_covers_and_a_fit_takes_it(data, model):
    output, held_out = data / "samples.jsonl", data / "held-out.jsonl"
    report = edgeprune.samples(data / "data", output=output, held_out=held_out, count=4, length=32, model=model).report
    coverage, curve = report.selection.coverage, report.selection.curve
    assert coverage.chosen < coverage.random
    assert coverage.least_random <= coverage.random <= coverage.most_random
    assert [point.samples for point in curve] == [2, 4, 8]
    assert all(0 < point.error < 1 for point in curve)
    # One path alone: its folders are sources.
    assert {group.source for group in report.selection.groups} == {"data", "data/notes"}
    # What comes next takes these files as they are.
    words = report.next_command.split()
    options = {name.removeprefix("--"): value for name, value in zip(words[3::2], words[4::2], strict=True)}
    assert options == {"calibration": str(output), "evaluate": str(held_out), "samples": "4", "length": "32"}
    request = request_of(model=words[2], **options | {"samples": 4, "length": 32})
    packed = pack_texts(request, load_model(str(model)), *read_texts(request), 32)
    assert packed.calibration.shape == (4, 32)
    assert "0 duplicates" not in str(packed.sources[0])
    alone = edgeprune.samples(data / "data", output=data / "alone.jsonl", count=6, length=32, model=model).report
    samples = int(alone.next_command.split("--samples ")[1].split()[0])
    request = request_of(model=model, calibration=data / "alone.jsonl", samples=samples, length=32)
    assert pack_texts(request, load_model(str(model)), *read_texts(request), 32).calibration.shape == (samples, 32)


def test_the_choice_is_the_same_for_a_seed(data, model):
    texts = {}
    for name, count, seed in (("a", 24, 0), ("b", 24, 0), ("c", 24, 1)):
        edgeprune.samples(data / "data", output=data / f"{name}.jsonl", count=count, length=32, model=model, seed=seed)
        texts[name] = (data / f"{name}.jsonl").read_text()
    assert texts["a"] == texts["b"] != texts["c"]


def test_the_command_line_reads_a_column_masks_names_and_prints_one_document(data):
    words = ["samples", data / "answers.csv", "--column", "answer", "--names", data / "names.txt"]
    result = run(*words, "--output", data / "out.jsonl", "--count", "2", "--length", "64", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["masked"] == {"phones": 6, "names": 6}
    assert document["duplicates"] == {"exact": 0, "near": 0}
    assert document["documents"] == len(records(data / "out.jsonl"))
    texts = [line["text"] for line in records(data / "out.jsonl")]
    assert all("[PHONE]" in text and "[NAME]" in text and "Ann" not in text for text in texts)
    assert records(data / "out.jsonl")[0]["provenance"]["source"].startswith("answers.csv, row ")
    # Once more: nothing is replaced but by --force, and nobody else's file then either.
    before = (data / "out.jsonl").read_bytes()
    again = run(*words, "--output", data / "out.jsonl", "--mask", "none")
    assert (again.returncode, (data / "out.jsonl").read_bytes()) == (2, before)
    assert "--force" in again.stderr
    shown = run(*words, "--output", data / "out.jsonl", "--mask", "none", "--force", "--count", "2", "--length", "64")
    assert shown.returncode == 0, shown.stderr
    assert "6 names, in 6 documents" in shown.stdout
    assert "+49 30 1234567" in (data / "out.jsonl").read_text()
    (data / "out.jsonl").write_text('{"text": "my own"}\n')
    assert run(*words, "--output", data / "out.jsonl", "--force").returncode == 2
    assert (data / "out.jsonl").read_text() == '{"text": "my own"}\n'


BAD = {
    "no file": (["missing.txt"], {}, "no such file"),
    "no path": ([], {}, "nothing to read"),
    "no samples": (["chats.jsonl"], {"count": 0}, "--count"),
    "no length": (["chats.jsonl"], {"length": 1}, "--length"),
    "too long for the model": (["chats.jsonl"], {"model": "MODEL", "length": 4096}, "positions"),
    "no model": (["chats.jsonl"], {"model": "./nowhere.json"}, "no such file"),
    "unknown kind": (["chats.jsonl"], {"mask": "faces"}, "--mask"),
    "no names": (["chats.jsonl"], {"names": "missing.txt"}, "missing.txt"),
    "no column": (["answers.csv"], {"column": "reply"}, "reply"),
    "no field": (["chats.jsonl"], {"column": "reply"}, "reply"),
    "within what is read": (["data"], {"output": "data/out.jsonl"}, "within"),
    "what is read itself": (["chats.jsonl"], {"output": "chats.jsonl"}, "exists already"),
    "no folder": (["chats.jsonl"], {"output": "nowhere/out.jsonl"}, "no folder"),
    "no jsonl": (["chats.jsonl"], {"output": "out.csv"}, ".jsonl"),
    "one file for both": (["chats.jsonl"], {"held_out": "out.jsonl"}, "both"),
    "a seed": (["chats.jsonl"], {"seed": -1}, "--seed"),
    "chats without a template": (["chats.jsonl"], {"model": "MODEL", "length": 32, "count": 2}, "chats.jsonl, line"),
}


@pytest.mark.parametrize(("paths", "options", "message"), BAD.values(), ids=list(BAD))
def test_bad_input_is_one_message_and_nothing_is_written(data, model, monkeypatch, paths, options, message):
    monkeypatch.chdir(data)
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    given = {name: model if value == "MODEL" else value for name, value in options.items()}
    with pytest.raises(InputError) as error:
        edgeprune.samples([Path(path) for path in paths], **{"output": "out.jsonl", **given})
    assert message in error.value.message + error.value.remedy
    assert error.value.remedy
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
