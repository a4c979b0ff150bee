"""Which tests may be skipped where CI is set: those that need a GPU, a mount that not every machine
allows, or a tracker that the tests' environment leaves out for its size, and what a layer refuses.

A plugin of pytest. Elsewhere a test may be skipped for what the machine lacks, a compiler say.
"""

import os
from collections.abc import Generator

import pytest
from pluggy import Result

ALLOWED = (
    "needs a GPU", "needs a mount", "needs the extra wandb", "needs the extra mlflow", "refused: ",
)  # fmt: skip
"""How their reasons begin."""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Generator[None, Result[pytest.TestReport], None]:
    """Any other skip is a failure."""
    report = (yield).get_result()
    if not os.environ.get("CI") or report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    _, _, said = report.longrepr
    reason = said.removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED):
        report.outcome = "failed"
        report.longrepr = f"skipped under CI, where this may not be missing: {reason}"
