"""The real command line on small image generators: fitted, drawn from, compared, and bad input."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune.cli.app import main
from edgeprune.generate.images import read_description
from edgeprune.generate.pixels import grid, to_pixels
from edgeprune.model.codec.codec import load_codec
from edgeprune.model.forward import token_logits, weight_stream
from edgeprune.model.load import load_directory
from edgeprune.report.schema import Report
from tests.support.bundles import fitted
from tests.support.commands import run
from tests.support.llamagen import random_llamagen
from tests.support.vq import small_vq

pytestmark = pytest.mark.slow

SIDE, PIXELS, CLASSES = 4, 16, 10
GIVEN = ("--codec", "vq.pt", "--num-heads", "8")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LlamaGen's two files, and a folder of pictures in folders of their classes."""
    folder = tmp_path_factory.mktemp("home")
    gpt = random_llamagen(dim=256, heads=8, channels=768, layers=3, vocabulary=64, classes=CLASSES + 1, side=SIDE)
    args = argparse.Namespace(num_classes=CLASSES, image_size=PIXELS, downsample_size=4, vocab_size=64, cls_token_num=1)
    torch.save({"model": gpt.state_dict(), "steps": 7, "args": args}, folder / "gpt.pt")
    torch.save({"model": small_vq().state_dict()}, folder / "vq.pt")
    torch.save({"model": small_vq(codes=32).state_dict()}, folder / "other.pt")
    torch.save({"model": small_vq(multipliers=(1, 2)).state_dict()}, folder / "fine.pt")
    (folder / "cut.pt").write_bytes((folder / "gpt.pt").read_bytes()[:100_000])
    torch.save({"model": gpt.state_dict(), "args": Trap()}, folder / "trap.pt")
    random = np.random.default_rng(0)
    for label in (0, 3):
        (folder / "pictures" / str(label)).mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / str(label) / f"{number}.png")
    (folder / "empty").mkdir()
    return folder


class Trap:
    """A pickle that would leave a file behind if it were executed."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


@pytest.fixture(scope="module")
def bundle(home: Path) -> Path:
    result = run(
        "fit",
        "gpt.pt",
        *GIVEN,
        "--device",
        "cpu",
        "--memory",
        "85%",
        "--weights",
        "float",
        "--cache",
        "float",
        "--max-quality-loss",
        "off",
        "--samples",
        "8",
        "--images",
        "12",
        "--batch",
        "2",
        "--cfg",
        "1.5",
        "--output",
        "bundle",
        cwd=home,
    )
    assert result.returncode in (0, 3), result.stderr
    return home / "bundle"


def test_the_report_shows_pictures_of_both(bundle: Path) -> None:
    report = Report.model_validate_json((bundle / "report.json").read_text())
    assert report.fitted.layer_parameters < report.dense.layer_parameters
    assert report.workload.batch == 4  # two pictures, each with the stream that guides it
    assert (report.workload.prompt, report.workload.context) == (1, SIDE**2)
    pictures = report.quality.pictures
    assert (pictures.images, pictures.at_once, pictures.cfg, pictures.side) == (12, 2, 1.5, PIXELS)
    assert pictures.dense.kernel.low <= pictures.dense.kernel.value <= pictures.dense.kernel.high
    assert pictures.dense_grid != pictures.fitted_grid
    seconds = report.experience["fitted"].seconds_per_image
    step = report.fitted.performance.decode.value
    assert seconds.source == "measured"
    assert seconds.value == pytest.approx((report.fitted.performance.prefill.value + 15 * step) / 2e3)
    assert report.quality.texts[0].rise_percent == report.quality.rise_percent
    page = (bundle / "report.html").read_text()
    assert pictures.dense_grid in page
    assert pictures.fitted_grid in page


def greedy_pixels(bundle: Path, codec: Path, label: int, cfg: float) -> np.ndarray:
    """By the checkpoint in the bundle and the codec's file, in torch, on whole sequences; (1, height, width, 3)."""
    model = load_directory(bundle / "model", "fitted")
    picture, size = model.decoder.picture, model.decoder.vocab_size
    codes: list[int] = []
    while len(codes) < picture.tokens:
        openings = [picture.opening(size, one) for one in (label, None)]
        ids = torch.tensor([[opening, *codes, 0] for opening in openings])
        with_class, without = token_logits(model.decoder, weight_stream(model), ids)[:, -1].double()
        codes.append(int((without + (with_class - without) * cfg).argmax()))
    return to_pixels(load_codec(codec).decode(torch.tensor([codes])).numpy())


def test_greedy_pictures_equal_those_of_torch(bundle: Path, home: Path) -> None:
    result = run(
        "run",
        bundle,
        "--class",
        "7",
        "--class",
        "2",
        "--count",
        "3",
        "--cfg",
        "1.75",
        "--temperature",
        "0",
        "--output",
        "greedy.png",
        cwd=home,
    )
    assert result.returncode == 0, result.stderr
    assert "s a picture, measured" in result.stderr
    seven, two = (greedy_pixels(bundle, home / "vq.pt", label, 1.75) for label in (7, 2))
    expected = np.asarray(grid(np.concatenate([seven, two, seven]))).astype(int)
    assert np.abs(np.asarray(Image.open(home / "greedy.png")).astype(int) - expected).max() <= 1  # ties of rounding
    assert (seven != two).any()


def test_drawn_pictures_have_a_seed_and_replace_nothing(bundle: Path, home: Path) -> None:
    def drawn(name: str, *words: str) -> np.ndarray:
        result = run("run", bundle, "--count", "2", "--output", name, *words, cwd=home)
        assert result.returncode == 0, result.stderr
        return np.asarray(Image.open(home / name))

    first = drawn("one.png", "--top-k", "20", "--top-p", "0.9")
    assert first.shape == (PIXELS, 2 * PIXELS, 3)
    np.testing.assert_array_equal(first, drawn("two.png", "--top-k", "20", "--top-p", "0.9"))
    assert (first != drawn("two.png", "--seed", "5", "--force")).any()
    assert not list(home.glob("*.part"))


def test_the_bundle_says_how_to_draw(bundle: Path) -> None:
    drawn = read_description(bundle)
    assert (drawn.side, drawn.num_classes, drawn.has_null, drawn.vocab_size, drawn.cfg) == (
        SIDE,
        CLASSES,
        True,
        64,
        1.5,
    )
    assert not (bundle / "tokenizer").exists()
    assert "codec/codec.onnx" in (bundle / "README.md").read_text()


def test_a_folder_of_pictures_calibrates_and_judges(home: Path) -> None:
    result = run(
        "fit",
        "gpt.pt",
        *GIVEN,
        "--device",
        "jetson-orin",
        "--memory",
        "90%",
        "--calibration",
        "pictures",
        "--samples",
        "6",
        "--images",
        "8",
        "--evaluate",
        "pictures",
        "--output",
        "ours",
        "--json",
        "--method",
        "magnitude+ls",
        cwd=home,
    )
    assert result.returncode in (0, 3), result.stderr
    report = Report.model_validate_json(result.stdout)
    assert report.quality.label == "perplexity"
    assert report.quality.pictures.reference == "pictures"
    assert report.quality.pictures.dense.reference_images == 12
    assert report.experience["fitted"].seconds_per_image.source == "estimated"


def test_methods_are_compared_on_what_the_model_draws(home: Path) -> None:
    result = run(
        "compare",
        "gpt.pt",
        *GIVEN,
        "--ratios",
        "20",
        "--methods",
        "default,magnitude",
        "--samples",
        "8",
        "--json",
        cwd=home,
    )
    assert result.returncode == 0, result.stderr
    rows = {row["method"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows.keys() == {"dense", "default", "magnitude"}
    assert rows["default"]["ratio"] == pytest.approx(0.2, abs=0.005)


FIT = ("fit", "gpt.pt", "--device", "jetson-orin", *GIVEN)
CASES = {
    "no codec": (["fit", "gpt.pt", "--device", "jetson-orin", "--num-heads", "8"], "--codec"),
    "no heads": (["fit", "gpt.pt", "--device", "jetson-orin", "--codec", "vq.pt"], "--num-heads"),
    "another codec": (["fit", "gpt.pt", "--device", "jetson-orin", "--num-heads", "8", "--codec", "other.pt"], "32"),
    "a finer codec": ([*FIT[:4], "--num-heads", "8", "--codec", "fine.pt"], "2 pixels a side of a code"),
    "a codec as model": (["fit", "vq.pt", "--device", "jetson-orin", "--codec", "vq.pt"], "--codec"),
    "a model as codec": ([*FIT[:4], "--num-heads", "8", "--codec", "gpt.pt"], "codec"),
    "a truncated model": (["fit", "cut.pt", "--device", "jetson-orin", *GIVEN], "cut.pt"),
    "a pickle with more in it": (["fit", "trap.pt", "--device", "jetson-orin", *GIVEN], "nothing of it was executed"),
    "another size": ([*FIT, "--image-size", "32"], "32"),
    "a prompt's length": ([*FIT, "--prompt", "8"], "--prompt"),
    "a vocabulary to reduce": ([*FIT, "--vocabulary", "samples"], "--vocabulary"),
    "gguf": ([*FIT, "--export", "gguf"], "GGUF"),
    "no guidance": ([*FIT, "--cfg", "0.5"], "--cfg"),
    "no pictures in a folder": ([*FIT, "--calibration", "empty"], "no images"),
    "missing features": ([*FIT, "--features", "none.onnx"], "none.onnx"),
    "a text": (["run", "bundle", "--prompt", "a cat"], "image generator"),
    "a text's length": (["run", "bundle", "--class", "1", "--max-new-tokens", "5"], "--max-new-tokens"),
    "an unknown class": (["run", "bundle", "--class", "10", "--output", "x.png"], "unknown class 10"),
    "an older picture": (["run", "bundle", "--class", "1", "--output", "old.png"], "--force"),
    "no name of a picture": (["run", "bundle", "--class", "1", "--output", "x.jpg"], "must end in .png"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_message(
    name: str, home: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """In this process: torch's import is most of what a command takes."""
    words, message = CASES[name]
    (home / "old.png").write_bytes(b"mine")
    before = {path.name for path in home.iterdir()}
    monkeypatch.chdir(home)
    monkeypatch.setattr("sys.argv", ["edgeprune", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr().err
    assert ended.value.code == 2, said
    assert message in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 2
    assert {path.name for path in home.iterdir()} == before
    assert (home / "old.png").read_bytes() == b"mine"


def test_a_language_model_draws_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    text = fitted(tmp_path_factory)
    result = run("run", text, "--class", "3")
    assert result.returncode == 2
    assert "language model" in result.stderr
    result = run("run", text, "--prompt", "the quick", "--cfg", "2")
    assert result.returncode == 2
    assert "--cfg with --prompt" in result.stderr
