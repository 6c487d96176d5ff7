"""With EDGEPRUNE_REQUIRE_ALL=1 a skipped test is a failure, those that need a GPU excepted; caches stay apart."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing of the user's cache is read or written, unless a place for it was named."""
    if "EDGEPRUNE_CACHE" not in os.environ:
        os.environ["EDGEPRUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    required = os.environ.get("EDGEPRUNE_REQUIRE_ALL") == "1"
    if required and report.skipped and item.get_closest_marker("gpu") is None and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped although everything is required: {report.longrepr}"


def pytest_terminal_summary(terminalreporter):
    needing = [report.nodeid for report in terminalreporter.stats.get("skipped", []) if "gpu" in report.keywords]
    if needing:
        terminalreporter.write_sep("-", "skipped: they need a GPU")
        for nodeid in needing:
            terminalreporter.write_line(nodeid)
