"""The output folder before any long work: its place, what it holds, the room on its disk."""

import pytest

from edgeprune.errors import InputError
from edgeprune.pipeline.output import check_output, check_space


def test_an_output_that_is_not_ours_is_never_replaced(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    check_output(theirs, force=False)
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not empty"):
        check_output(theirs, force=False)
    with pytest.raises(InputError, match="is not a bundle"):
        check_output(theirs, force=True)
    with pytest.raises(InputError, match="is a file"):
        check_output(theirs / "thesis.txt", force=True)


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="writes up to"):
        check_space(tmp_path / "deep" / "out", 2**60)
    assert not (tmp_path / "deep").exists()


def test_a_place_that_cannot_be_looked_at_is_told(tmp_path):
    with pytest.raises(InputError, match="File name too long"):
        check_output(tmp_path / ("x" * 300), force=False)
