"""A run among processes: whose clip is whose, and which random numbers a clip has."""

from argparse import Namespace
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from mirage_min.training import run


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


@dataclass
class Recipe:
    lr: float = 0.1
    batch: int = 2
    bf16: bool = True


def test_a_run_is_its_recipe_its_folders_and_its_pairs_and_another_is_refused(tmp_path):
    def settings(names=("a", "b"), lr=0.1, **given):
        return run.settings(Namespace(**dict(out="first", base="cog") | given), Recipe(lr), list(names))
    w = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([w])
    run.save(tmp_path, 7, {"w": w}, optimizer, settings())
    assert run.resume(tmp_path, {"w": w}, optimizer, settings(names=["a", "b"], lr=0.1)) == 7
    for other, said in ((settings(lr=0.2), "lr: then 0.1, now 0.2"), (settings(out="second"), "--out: then first"),
                        (settings(base="wan"), "--base: then cog, now wan"),
                        (settings(mirage="m"), "--mirage: then None, now m"),
                        (settings(names="a"), "--data: then 2 pairs, .*, now 1 pairs, "),
                        (settings(names="ac"), "--data: then 2 pairs, .*, now 2 pairs, ")):
        with pytest.raises(ValueError, match=f"belongs to another run, 1 things differ: {said}"):
            run.resume(tmp_path, {"w": w}, optimizer, other)


@pytest.mark.parametrize("word, wanted", [("on", True), ("YES", True), ("1", True), ("off", False), ("False", False)])
def test_booleans_are_what_they_say(word, wanted):
    assert run.override(Recipe(), [f"bf16={word}"]).bf16 is wanted
    with pytest.raises(ValueError, match="bf16 must be bool, got 'perhaps'"):
        run.override(Recipe(), ["bf16=perhaps"])


def test_a_device_is_the_one_named_and_auto_is_the_best_that_torch_can_use(monkeypatch):
    assert run.choose_device("cpu") == "cpu"
    for there, wanted in (((True, True), "cuda"), ((False, True), "mps"), ((False, False), "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there[0])
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there[1])
        assert run.choose_device("auto") == wanted


def test_what_no_recipe_can_mean_and_no_machine_has_is_refused():
    run.check(Recipe())
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        run.check(Recipe(batch=0))
    with pytest.raises(ValueError, match="--device nonsense: "):
        run.choose_device("nonsense")


def test_clips_of_neighbouring_steps_and_seeds_have_random_numbers_of_their_own():
    first = [tuple(torch.rand(2, generator=run.draws(seed, step, k)).tolist())
             for seed in range(3) for step in range(20) for k in range(8)]
    again = [tuple(torch.rand(2, generator=run.draws(seed, step, k)).tolist())
             for seed in range(3) for step in range(20) for k in range(8)]
    assert first == again and len(set(first)) == len(first)


def test_the_learning_rate_rises_evenly_to_the_whole_and_falls_as_half_a_cosine_to_nothing():
    rates = [run.schedule(step, 4, 10, cosine=True) for step in range(11)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates[7] == pytest.approx(0.5) and rates[10] == pytest.approx(0)
    assert all(rates[4 + k] + rates[10 - k] == pytest.approx(1) for k in range(7))
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert [run.schedule(step, 4, 10, cosine=False) for step in (3, 4, 9)] == [1, 1, 1]
    assert run.schedule(0, 0, 10, cosine=True) == 1
