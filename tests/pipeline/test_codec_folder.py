"""The folder of a codec: its graph makes the codec's pixels, its description says how pictures are sampled."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from edgeprune.generate.guidance import sampling_of
from edgeprune.generate.images import CODEC_GRAPH, DESCRIPTION
from edgeprune.generate.pixels import CodecRunner, to_pixels
from edgeprune.model.codec.codec import load_codec
from edgeprune.pipeline.codec_folder import write_codec_folder
from edgeprune.pipeline.imaging import Imaging
from tests.support.picture_decoders import CODES, SIDE, decoder
from tests.support.vq import small_vq


@pytest.fixture(scope="module")
def vq():
    return small_vq(codes=CODES)


@pytest.fixture
def folder(vq, tmp_path):
    """Written over one of an earlier run."""
    torch.save({"model": vq.state_dict()}, tmp_path / "vq.pt")
    imaging = Imaging(load_codec(tmp_path / "vq.pt"), sampling_of(decoder(), 3.5), 8, None)
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "stale.onnx").write_text("of another run")
    assert write_codec_folder(tmp_path / "codec", decoder(), imaging) == tmp_path / "codec"
    return tmp_path / "codec"


def test_the_graph_makes_the_codecs_pixels(vq, folder):
    codes = np.random.default_rng(0).integers(0, CODES, (3, SIDE**2))
    expected = to_pixels(vq.decode(torch.from_numpy(codes)).numpy()).astype(int)
    assert np.abs(CodecRunner(folder / CODEC_GRAPH).pixels(codes) - expected).max() <= 1
    assert expected.std() > 5


def test_the_description_is_what_drawing_needs_and_nothing_stale_is_left(folder):
    assert json.loads((folder / DESCRIPTION).read_text()) == {
        **dict(vars(decoder().picture)),
        "vocab_size": CODES,
        "cfg": 3.5,
    }
    assert not (folder / "stale.onnx").exists()
