"""A run among processes: whose clip is whose. What several compute together is in test_distributed.py."""

from types import SimpleNamespace

import pytest
import torch

from mirage_min.training import processes


@pytest.mark.parametrize("batch, n, accumulate", [(6, 1, 1), (6, 1, 3), (12, 3, 2), (4, 4, 1), (8, 2, 2), (8, 8, 1)])
def test_the_pieces_of_all_processes_are_the_batch_each_clip_once_in_order(monkeypatch, batch, n, accumulate):
    recipe, clips = SimpleNamespace(batch=batch, accumulate=accumulate), []
    monkeypatch.setattr(processes, "world", lambda: n)
    for rank in range(n):
        monkeypatch.setattr(processes, "rank", lambda: rank)
        pieces = processes.pieces(recipe)
        assert [len(piece) for piece in pieces] == [batch // n // accumulate] * accumulate
        clips += [k for piece in pieces for k in piece]
    assert clips == list(range(batch))


@pytest.mark.parametrize("batch, accumulate", [(5, 1), (4, 4), (0, 1)])
def test_a_batch_that_does_not_divide_is_refused(monkeypatch, batch, accumulate):
    monkeypatch.setattr(processes, "world", lambda: 2)
    with pytest.raises(ValueError, match=f"a batch of {batch} clips does not divide among 2 processes"):
        processes.pieces(SimpleNamespace(batch=batch, accumulate=accumulate))


def test_what_is_not_finite_is_named_with_the_step_and_the_clips():
    processes.check_finite(3, {"mse": torch.tensor(0.5)}, torch.tensor(1.0), ["a"])
    for terms, norm, said in (({"mse": torch.tensor(float("nan"))}, 1.0, "mse nan, gradient norm 1"),
                              ({"mse": 0.25}, float("inf"), "mse 0.25, gradient norm inf")):
        with pytest.raises(ValueError, match=f"step 3: not finite: {said}; clips: a, b; the last checkpoint is as it"):
            processes.check_finite(3, terms, torch.tensor(norm), ["a", "b"])


def test_alone_a_process_joins_nothing_and_its_gradients_stay(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes.join("cpu")
    assert (processes.rank(), processes.world()) == (0, 1)
    w = torch.nn.Parameter(torch.zeros(3))
    w.grad, terms = torch.tensor([1.0, 2.0, 3.0]), {"mse": 0.5}
    processes.reduce({"w": w}, terms)
    assert w.grad.tolist() == [1, 2, 3] and terms == {"mse": 0.5}
    processes.leave()
