"""A pytest plugin for CI (`-p tools.fail_on_skip`): a skipped test fails.

A test that misses something (bubblewrap, docker, redis) skips with its reason on a laptop. On CI nothing may be
missing: a skip there is a test that nobody runs any more. An expected failure (xfail) is no skip.
"""

from __future__ import annotations

from typing import Any

import pytest

_REASON = "skipped on CI, where nothing may be missing"


def _fail(report: Any) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{_REASON}: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Any:
    report = yield
    _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Any:
    report = yield
    _fail(report)
    return report
