"""Run tests in a process for itself and report to the one that started it (grade.py): not meant to be called by hand.

A job comes as JSON on stdin: tests (pytest's ids), seed, nonce, seconds, protections, hidden (folders not to be read).
The process shuts itself in (cage.py) before it imports anything. The report goes as JSON to the file descriptor named
on the command line, once, at the end, with the nonce; without it, whatever is printed and whatever the exit status,
nothing has passed.
"""

import json
import os
import sys
import tempfile
from pathlib import Path


class Report:
    """Every collected test with its outcome; a test passes if it ran, and nothing failed before, in or after it."""

    def __init__(self):
        self.outcomes, self.failed, self.error, self.message = {}, "", "", ""

    def pytest_collection_finish(self, session):
        self.outcomes = {item.nodeid: "not run" for item in session.items}

    def pytest_runtest_setup(self, item):
        torch.manual_seed(0)

    def pytest_runtest_logreport(self, report):
        if report.failed or (report.when == "call" and self.outcomes[report.nodeid] == "not run"):
            self.outcomes[report.nodeid] = report.outcome

    def pytest_exception_interact(self, node, call, report):
        if not self.failed:
            self.failed, self.error = node.nodeid, call.excinfo.typename
            self.message = f"{call.excinfo.value}"[:500]


def reseed(seed: int) -> None:
    """From here on torch.manual_seed(n) means n + seed: answers learned by heart from a test's numbers are wrong."""
    manual_seed = torch.manual_seed
    torch.manual_seed = lambda n: manual_seed(n + seed)


if __name__ == "__main__":
    job = json.load(sys.stdin)
    sys.stdin = open(os.devnull)
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import cage

    cage.limit(job["seconds"])
    tree = Path.cwd().resolve()
    cage.enter([tree, *cage.python_folders([Path(folder) for folder in job["hidden"]])], tuple(job["protections"]))
    sys.path[0] = tempfile.tempdir = str(tree)  # named as such, or a library would try for one by writing into it

    import pytest
    import torch

    torch.set_num_threads(1)
    reseed(job["seed"])
    report = Report()
    # pytest opens nothing for writing
    options = ["-x", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:logging", "--capture=no"]
    status = pytest.main([*options, *job["tests"]], plugins=[report])
    answer = {"nonce": job["nonce"], "status": int(status), **vars(report)}
    with os.fdopen(int(sys.argv[1]), "w") as pipe:
        json.dump(answer, pipe)
