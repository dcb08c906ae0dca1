"""A plugin of pytest that writes each test's outcome to a file at once: pytest -p pytest_results --results FILE."""

from pathlib import Path

import pytest
from results import Results


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, metavar="FILE", help="JSON of each test's outcome, kept however it ends")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--results")
    # Of processes side by side, the one that hears of all tests.
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Results(path)))


class Outcomes:
    def __init__(self, results: Results) -> None:
        self.results = results

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # What set-up and removal report is of interest only where they did not pass.
        if report.when == "call" or not report.passed:
            entry = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
            if not report.passed:
                entry["why"] = str(report.longrepr)[-1500:]
            self.results.put("tests", report.nodeid, entry)
