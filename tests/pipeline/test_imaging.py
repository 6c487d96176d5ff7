"""What pictures are calibrated on: classes in turn, some of none, folders as codes; and guidance by default."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune.errors import InputError
from edgeprune.generate.guidance import sampling_of
from edgeprune.model.codec.codec import load_codec
from edgeprune.pipeline.imaging import Imaging, picture_samples, read_codes
from tests.support.picture_decoders import CODES, SIDE, decoder
from tests.support.vq import small_vq


@pytest.fixture(scope="module")
def imaging(tmp_path_factory: pytest.TempPathFactory) -> Imaging:
    path = tmp_path_factory.mktemp("codec") / "vq.pt"
    torch.save({"model": small_vq(codes=CODES).state_dict()}, path)
    return Imaging(load_codec(path), sampling_of(decoder(), None), 8, None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve of each of two classes."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label in (2, 7):
        (folder / str(label)).mkdir()
        for number in range(12):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{number}.png")
    return folder


def test_a_folder_becomes_codes_behind_its_classes(pictures: Path, imaging: Imaging) -> None:
    ids, taken, left_out = read_codes(pictures, decoder(), imaging, 100, 0)
    assert (taken, left_out) == ("24 of 24 pictures of 2 classes", "nothing was left out")
    assert ids.shape == (24, 1 + SIDE**2)
    assert Counter(ids[:, 0].tolist()).keys() == {CODES + 2, CODES + 7, CODES + 10}
    assert (ids[:, 0] == CODES + 10).sum() == 2
    files = sorted(pictures.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    whole = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    assert {tuple(row) for row in ids[:, 1:]} == {tuple(row) for row in imaging.codec.encode(whole).tolist()}


def test_what_is_held_out_is_not_calibrated_on(pictures: Path, imaging: Imaging) -> None:
    samples = picture_samples(decoder(), imaging, pictures, (), 12, 0)
    calibration, evaluation, origin = samples.calibration, samples.evaluation, samples.origin
    assert [str(source) for source in samples.sources] == [
        f"read {pictures.name}: 15 of 24 pictures of 2 classes; 3 held out to evaluate on (nothing was left out)"
    ]
    assert calibration.shape == (12, SIDE**2)  # the last code is never fed
    (held_out,) = evaluation.values()
    assert len(held_out) == 3
    assert not {tuple(row[1:-1]) for row in held_out} & {tuple(row[1:]) for row in calibration}
    assert origin == f"12 pictures of {pictures.name}"


def test_a_class_that_the_model_has_not_is_refused(pictures: Path, imaging: Imaging) -> None:
    with pytest.raises(InputError, match="holds class 7, the model has 5 classes"):
        read_codes(pictures, decoder(classes=5), imaging, 100, 0)


def test_folders_that_tell_no_class_are_told(tmp_path: Path, imaging: Imaging) -> None:
    for name in ("train/7/a.png", "cats/b.png", "c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), "red").save(tmp_path / name)
    (tmp_path / "notes.heic").write_bytes(b"")
    _, taken, left_out = read_codes(tmp_path, decoder(), imaging, 100, 0)
    assert taken == "3 of 3 pictures of 1 class"
    assert left_out == "2 of no class, their folders are no numbers: cats; not read: 1 of .heic"


def test_ids_of_wordnet_are_refused_by_a_model_with_classes_alone(tmp_path: Path, imaging: Imaging) -> None:
    (tmp_path / "n01440764").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "n01440764" / "a.png")
    with pytest.raises(InputError, match=r"WordNet ids \(n01440764\)") as caught:
        read_codes(tmp_path, decoder(), imaging, 100, 0)
    assert "0 to 9" in caught.value.remedy
    assert len(read_codes(tmp_path, decoder(classes=0), imaging, 100, 0)[0]) == 1
