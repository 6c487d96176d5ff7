"""Images as text: every pixel of a small one, a JPEG of a large one."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from edgeprune.evaluate.grids import data_uri
from tests.support.sample_pictures import noise


def opened(uri: str) -> Image.Image:
    kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", uri).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format.lower() == kind
    return image


def test_a_small_image_keeps_every_pixel():
    image = noise(28, 112)
    assert np.array_equal(opened(data_uri(image)), image)


def test_a_large_image_is_made_smaller_and_stays_alike():
    image = noise(40, 80).resize((2048, 1024), Image.Resampling.BICUBIC)
    shown = opened(uri := data_uri(image))
    assert (shown.size, shown.format) == ((1024, 512), "JPEG")
    assert len(uri) < 500_000
    assert np.abs(np.asarray(shown, float) - np.asarray(image.resize((1024, 512)), float)).mean() < 3


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_other_modes(mode):
    assert opened(data_uri(noise().convert(mode))).mode == "RGB"
