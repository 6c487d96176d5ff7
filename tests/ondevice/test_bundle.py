"""The folder of a bundle as the device opens it: whole, or refused."""

import pytest

from edgeprune.errors import InputError
from edgeprune.ondevice.bundle import open_bundle
from tests.support.bundle_files import write


@pytest.mark.parametrize(
    "break_it",
    [
        lambda out: (out / "manifest.json").unlink(),
        lambda out: (out / "manifest.json").write_text("{"),
        lambda out: (out / "manifest.json").write_text("[]"),
        lambda out: (out / "rungs" / "0" / "onnx" / "model.onnx").unlink(),
    ],
)
def test_what_is_no_whole_bundle_is_refused(tmp_path, break_it):
    write(tmp_path, tmp_path / "out")
    break_it(tmp_path / "out")
    with pytest.raises(InputError):
        open_bundle(tmp_path / "out")
