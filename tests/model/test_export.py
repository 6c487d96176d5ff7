"""Exports by name, and what they cannot hold."""

import pytest

from edgeprune.errors import InputError
from edgeprune.model.export import check_exports
from edgeprune.model.load import load_model
from tests.support.families import PICTURES, save_family


@pytest.mark.parametrize("case", PICTURES)
def test_image_generators_are_refused(tmp_path, case):
    save_family(tmp_path / case, case)
    with pytest.raises(InputError, match=f"no architecture for the family {case}"):
        check_exports(["gguf"], load_model(str(tmp_path / case)), "uniform", reduced=False)
