"""Every pytest process has its share of the cores: torch would give each of them all."""

import os

import pytest

# xdist's controller reads this file too, and what it put into the environment its workers would inherit: only they set
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))  # before torch is imported
os.environ.setdefault("MKL_CBWR", "AUTO")  # as desk.open_up has it in a command
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or threads that wait would take the other process's core


@pytest.fixture(autouse=True)
def the_same_number_of_threads():
    """A script tried in this process may change it, and results then differ in the last bit."""
    import torch

    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
