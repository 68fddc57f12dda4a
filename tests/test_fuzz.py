"""tests/fuzz.py does what it says: the same case is the same input, and each outcome goes into its own column."""

import signal
import time
from random import Random

import pytest
import torch

from tests import fuzz
from tests.fuzz_changes import Lost, change_bytes, change_json, change_tensors


@pytest.fixture(autouse=True)
def alarm():
    before = signal.signal(signal.SIGALRM, fuzz.overdue)
    yield
    signal.signal(signal.SIGALRM, before)


def fails(error):
    def door(draws):
        raise error
    return door


def lasts(draws):
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize("door, column", [
    (lambda draws: None, "accepted"), (fails(ValueError("a.mp4: no")), "refused"), (fails(OSError("no")), "refused"),
    (fails(Lost("mp4")), "lost"), (fails(KeyError("x")), "traceback"), (fails(RuntimeError("x")), "traceback"),
    (fails(SystemExit(2)), "traceback"), (lasts, "hang"), (lambda draws: bytearray(2**27), "memory")])
def test_every_outcome_has_its_column(monkeypatch, door, column):
    monkeypatch.setattr(fuzz, "LIMIT", 0.3 if door is lasts else 20)
    monkeypatch.setattr(fuzz, "MEMORY", 2**26)
    assert fuzz.attempt(door, Random(0))[0] == column


def test_a_case_is_a_function_of_its_name():
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    for change in (lambda d: change_bytes(bytes(range(200)), d), lambda d: change_json({"a": [1, {"b": 2}]}, d),
                   lambda d: str(change_tensors(tensors, {"t": "1", "n": "x"}, d))):
        first, again = ([change(Random(f"1 door {n}")) for n in range(20)] for _ in range(2))
        assert first == again and len(set(first)) > 10, "twenty cases are the same, or all alike"
