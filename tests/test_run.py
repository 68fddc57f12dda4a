"""A run among processes: whose clip is whose, and which random numbers a clip has."""

from types import SimpleNamespace

import pytest
import torch

from mirage_min import run


@pytest.mark.parametrize("batch, processes, accumulate", [(6, 1, 1), (6, 1, 3), (12, 3, 2), (4, 4, 1)])
def test_the_pieces_of_all_processes_are_the_batch_each_clip_once_in_order(monkeypatch, batch, processes, accumulate):
    recipe, clips = SimpleNamespace(batch=batch, accumulate=accumulate), []
    monkeypatch.setattr(run, "world", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(run, "rank", lambda: rank)
        pieces = run.pieces(recipe)
        assert [len(piece) for piece in pieces] == [batch // processes // accumulate] * accumulate
        clips += [k for piece in pieces for k in piece]
    assert clips == list(range(batch))


@pytest.mark.parametrize("batch, accumulate", [(5, 1), (4, 4), (0, 1)])
def test_a_batch_that_does_not_divide_is_refused(monkeypatch, batch, accumulate):
    monkeypatch.setattr(run, "world", lambda: 2)
    with pytest.raises(ValueError, match=f"a batch of {batch} clips does not divide among 2 processes"):
        run.pieces(SimpleNamespace(batch=batch, accumulate=accumulate))


def test_clips_of_neighbouring_steps_and_seeds_have_random_numbers_of_their_own():
    first = [tuple(torch.rand(2, generator=run.draws(seed, step, k)).tolist())
             for seed in range(3) for step in range(20) for k in range(8)]
    again = [tuple(torch.rand(2, generator=run.draws(seed, step, k)).tolist())
             for seed in range(3) for step in range(20) for k in range(8)]
    assert first == again and len(set(first)) == len(first)
