"""What the tests of several tools share."""

import pytest

from edgeprune.progress import Silent
from tests.support.image_model import RECIPE, some_images
from tools.train_image_model import train_all


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a tiny image model, its codec and a classifier."""
    folder = tmp_path_factory.mktemp("trained")
    train_all(some_images(), folder, RECIPE, Silent(), held_out=4)
    return folder
