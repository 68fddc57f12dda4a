"""Run tests in a process of its own and report to the one that started it (grade.py): not meant to be called by hand.

A job comes as JSON on stdin: tests (pytest's ids), seed, nonce. The report goes as JSON to the file descriptor named on
the command line, once, at the end, with the nonce; without it whatever is printed and whatever the exit status, nothing
has passed.
"""

import json
import os
import sys

import pytest
import torch


class Report:
    """Every collected test with its outcome; a test passes if it ran, and nothing failed before, in or after it."""

    def __init__(self, seed: int):
        self.seed, self.outcomes, self.message = seed, {}, ""

    def pytest_collection_finish(self, session):
        self.outcomes = {item.nodeid: "not run" for item in session.items}

    def pytest_runtest_setup(self, item):
        torch.manual_seed(0)

    def pytest_runtest_logreport(self, report):
        if report.failed or (report.when == "call" and self.outcomes[report.nodeid] == "not run"):
            self.outcomes[report.nodeid] = report.outcome
        if report.failed and not self.message:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.message = f"{report.nodeid}: {crash.message if crash else report.longrepr}"[:500]

    def pytest_collectreport(self, report):
        if report.failed:
            self.message = str(report.longrepr)[-500:]


def reseed(seed: int) -> None:
    """From here on torch.manual_seed(n) means n + seed: answers learned by heart from a test's numbers are wrong."""
    manual_seed = torch.manual_seed
    torch.manual_seed = lambda n: manual_seed(n + seed)


if __name__ == "__main__":
    job, sys.stdin = json.load(sys.stdin), open(os.devnull)
    sys.path[:0] = [os.getcwd()]
    torch.set_num_threads(1)
    reseed(job["seed"])
    report = Report(job["seed"])
    status = pytest.main(["-x", "-o", "addopts=", "-p", "no:cacheprovider", *job["tests"]], plugins=[report])
    answer = {"nonce": job["nonce"], "status": int(status), "outcomes": report.outcomes, "message": report.message}
    with os.fdopen(int(sys.argv[1]), "w") as pipe:
        json.dump(answer, pipe)
