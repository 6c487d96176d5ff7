"""Files that packages installed, found without an import."""

import shutil
import sys

from edgeprune.model.checkpoint.packaged import packaged_file


def installed(folder, *names):
    """A package that pip could have put there: its list of files, and some of them."""
    metadata = folder / "some_weights-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: some-weights\nVersion: 1.0\n")
    (metadata / "RECORD").write_text("".join(f"some_weights/{name},,\n" for name in names))
    (folder / "some_weights").mkdir()
    (folder / "some_weights" / "__init__.py").write_text("raise ImportError('imported')")


def test_a_file_is_found_by_its_name_and_the_package_is_not_imported(tmp_path, monkeypatch):
    installed(tmp_path, "__init__.py", "data/model.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "some_weights" / "data" / "model.gguf"
    assert packaged_file("some-weights", "model.gguf") is None  # listed, but not there
    path.parent.mkdir()
    path.write_bytes(b"weights")
    assert packaged_file("some-weights", "model.gguf").samefile(path)
    assert packaged_file("some-weights", "other.gguf") is None
    assert "some_weights" not in sys.modules
    shutil.rmtree(tmp_path / "some_weights-1.0.dist-info")
    assert packaged_file("some-weights", "model.gguf") is None


def test_a_package_that_is_not_installed_has_no_file():
    assert packaged_file("no-such-package-of-weights", "model.gguf") is None
    assert packaged_file("numpy", "METADATA").read_text().startswith("Metadata-Version")
