"""The command that generates: text as it comes, pictures as a grid, options of one refused with the other."""

from __future__ import annotations

import pytest
from PIL import Image
from typer.testing import CliRunner

from edgeprune.cli.app import app
from edgeprune.errors import InputError
from edgeprune.generate.pixels import write_picture


def run(*words: str):
    return CliRunner().invoke(app, ["run", "bundle", *words])


def test_text_is_printed_piece_by_piece_and_greedy_by_default(monkeypatch):
    asked = []

    def stream_text(*given):
        asked.append(given)
        yield from ("the ", "quick")

    monkeypatch.setattr("edgeprune.generate.text.stream_text", stream_text)
    assert run("--prompt", "say").stdout == "the quick\n"
    bundle, prompt, tokens, temperature, top_k, top_p, seed, _, draft = asked[0]
    assert (str(bundle), prompt, tokens, temperature, top_k, top_p, seed) == ("bundle", "say", None, 0.0, 0, 1.0, 0)
    assert draft is None
    run("--prompt", "say", "--max-new-tokens", "3", "--temperature", "0.7", "--top-k", "5", "--seed", "9")
    assert asked[1][2:7] == (3, 0.7, 5, 1.0, 9)


def test_pictures_are_drawn_from_all_that_may_be_by_default(monkeypatch, tmp_path):
    asked = []

    class Painter:
        at_once = 4

    def painter_of(*given):
        asked.append(given)
        return Painter()

    def draw_grid(painter, classes, count, seed, output, progress):
        write_picture(Image.new("RGB", (8, 8)), output)
        return 3.0

    monkeypatch.setattr("edgeprune.generate.images.painter_of", painter_of)
    monkeypatch.setattr("edgeprune.generate.images.draw_grid", draw_grid)
    output = tmp_path / "grid.png"
    result = run("--class", "3", "--class", "7", "--count", "6", "--output", str(output))
    assert result.stdout == f"{output}\n"
    assert "0.50 s a picture, measured here, 4 at once" in result.stderr
    assert asked[0][1:5] == ([3, 7], 6, None, 1.0)
    refused = run("--output", str(output))
    assert isinstance(refused.exception, InputError)
    assert len(asked) == 1  # the output was checked before the bundle was opened
    (tmp_path / "photo.png").write_bytes(b"the user's")
    with pytest.raises(InputError, match="not written by edgeprune"):
        raise run("--output", str(tmp_path / "photo.png"), "--force").exception
    assert (tmp_path / "photo.png").read_bytes() == b"the user's"
    assert run("--output", str(output), "--force", "--temperature", "0").exit_code == 0
    assert asked[1][4] == 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", "say", "--class", "3"), "--class with --prompt"),
        (("--prompt", "say", "--count", "3", "--cfg", "2"), "--count, --cfg with --prompt"),
        (("--max-new-tokens", "3"), "--max-new-tokens without --prompt"),
    ],
)
def test_options_of_texts_and_of_pictures_do_not_go_together(words, message):
    error = run(*words).exception
    assert isinstance(error, InputError)
    assert message in error.message
    assert "eave" in error.remedy


@pytest.mark.parametrize(
    ("temperature", "is_said"), [((), True), (("--temperature", "0"), True), (("--temperature", "0.7"), False)]
)
def test_options_of_drawing_without_a_temperature_are_told(monkeypatch, temperature, is_said):
    monkeypatch.setattr("edgeprune.generate.text.stream_text", lambda *given: iter(["text"]))
    result = run("--prompt", "say", "--top-p", "0.5", "--seed", "3", *temperature)
    assert result.stdout == "text\n"
    assert ("--top-p, --seed: of no effect without a --temperature above 0" in result.stderr) is is_said


@pytest.mark.parametrize("seed", ["-1", str(2**70)])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    assert f"--seed {seed}" in run("--prompt", "say", "--seed", seed).exception.message


def test_a_prompt_of_bytes_that_are_no_text_is_refused():
    error = run("--prompt", b"caf\xe9".decode("utf-8", "surrogateescape")).exception
    assert isinstance(error, InputError)
    assert "--prompt 'caf\\udce9' is not UTF-8 text" in error.message
