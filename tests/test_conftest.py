"""What a skip means: nothing, or a failure where all is required; and what the summary says of it."""

from __future__ import annotations

import pytest

from tests.support import ROOT
from tests.support.device import NO_SSHD

pytest_plugins = ("pytester",)

TESTS = f"""
import pytest

@pytest.mark.gpu
def test_on_a_gpu():
    pytest.skip("no GPU")

def test_over_ssh():
    pytest.skip({NO_SSHD!r})

@pytest.mark.xfail
def test_that_is_known_to_fail():
    assert False

def test_that_passes():
    pass
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Runs these files with the configuration of all tests; required: whether a skip is a failure."""

    def run(required: bool, **files: str) -> pytest.RunResult:
        pytester.makeini("[pytest]\nmarkers = gpu: needs a GPU")
        pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
        pytester.makepyfile(**files)
        monkeypatch.setenv("EDGEPRUNE_REQUIRE_ALL", str(int(required)))
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist")

    return run


def test_the_summary_names_what_is_missing(run):
    result = run(False, test_one=TESTS, test_two="import pytest; pytest.importorskip('no_such_module')")
    assert result.ret == 0
    result.assert_outcomes(passed=1, skipped=3, xfailed=1)
    result.stdout.fnmatch_lines(["*1 skipped: sshd is missing*", "*apt-get install openssh-server"])
    result.stdout.fnmatch_lines(["*skipped: they need a GPU*", "test_one.py::test_on_a_gpu"])


def test_a_skip_is_a_failure_where_all_is_required_but_for_a_gpu(run):
    result = run(True, test_one=TESTS)
    assert result.ret == 1
    result.assert_outcomes(passed=1, skipped=1, failed=1, xfailed=1)
    result.stdout.fnmatch_lines(["*skipped although everything is required: *sshd is not installed*"])


def test_so_is_a_file_that_skips_itself(run):
    result = run(True, test_two="import pytest; pytest.importorskip('no_such_module')")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*skipped although everything is required: *no_such_module*"])
