"""What holds for all tests: caches of their own, short measurements, and what a skip means.

With EDGEPRUNE_REQUIRE_ALL=1 a skip is a failure, of a test or of a whole file; those that need a GPU are excepted.
"""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

from edgeprune.ondevice.durations import VARIABLE
from tests.support.device import NO_SSHD
from tests.support.durations import durations

# A machine under load is slow, and what a property holds for is told by some dozens of cases;
# HYPOTHESIS_PROFILE=default tries the library's hundred.
settings.register_profile("suite", max_examples=40, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

SHORT = {
    "measure_seconds": 0.1,
    "survey_seconds": 0.04,
    "cross_check_seconds": 0.1,
    "probe_seconds": 0.01,
    "warm_up_seconds": 0.02,
    "block_ms": 4.0,
}


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keeps the user's cache out, unless a place for it was named; the processes of a run share one."""
    if "EDGEPRUNE_CACHE" not in os.environ:
        folder = tmp_path_factory.getbasetemp()
        own = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
        os.environ["EDGEPRUNE_CACHE"] = str(own / "cache")


@pytest.fixture(scope="session", autouse=True)
def _short_measurements():
    """Shortens what only a user waits for: the tests look at what is made of a figure, not at its interval."""
    if VARIABLE not in os.environ:
        os.environ.update(durations(**SHORT))


@pytest.fixture(scope="session", autouse=True)
def _heard_interrupts():
    """Lets SIGINT be heard, here and in children: a shell ignores it for what it starts in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def whole_measurements(monkeypatch):
    """Gives a test the product's own durations."""
    monkeypatch.delenv(VARIABLE)


def _all_is_required() -> bool:
    return os.environ.get("EDGEPRUNE_REQUIRE_ALL") == "1"


def _as_failure(report: pytest.TestReport | pytest.CollectReport) -> None:
    report.outcome = "failed"
    report.longrepr = f"skipped although everything is required: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    is_skip = report.skipped and not hasattr(report, "wasxfail")
    if _all_is_required() and is_skip and item.get_closest_marker("gpu") is None:
        _as_failure(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A file that skips itself while it is imported has no tests whose marks could be asked for."""
    report = yield
    if _all_is_required() and report.skipped:
        _as_failure(report)
    return report


def pytest_terminal_summary(terminalreporter):
    """Says what a skip hides: a missing package of the system, or a GPU."""
    skipped = terminalreporter.stats.get("skipped", [])
    if without_sshd := sum(NO_SSHD in str(report.longrepr) for report in skipped):
        terminalreporter.write_sep("-", f"{without_sshd} skipped: sshd is missing")
        terminalreporter.write_line("To run them too: apt-get install openssh-server")
    if needing := [report.nodeid for report in skipped if "gpu" in getattr(report, "keywords", ())]:
        terminalreporter.write_sep("-", "skipped: they need a GPU")
        for nodeid in needing:
            terminalreporter.write_line(nodeid)
