"""The memory of a step: counted on tensors without data, compared with what is free, less with other settings."""

import os
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from mirage_min.training import memory

MIB = 2**20


@dataclass
class Recipe:
    """Every setting that memory.LESS may change."""

    batch: int = 8
    accumulate: int = 2
    frames: int = 17
    height: int = 64
    width: int = 64
    tiles: int = 2
    d_trunc: int = 1
    checkpoint_decoder: bool = False
    checkpoint_dit: bool = False
    shard: bool = False


class Model(nn.Module):
    """1 MiB that is trained, and a frozen transformer of 4."""

    def __init__(self):
        super().__init__()
        self.trained, self.dit = nn.Parameter(torch.zeros(MIB // 4)), nn.Linear(MIB, 1, bias=False)
        self.dit.requires_grad_(False)


def step(models, recipe, x_ni, x_gt, terms):
    """Holds the clips seven times more, and as many MiB as the settings say."""
    B, _, T, H, W = x_ni.shape
    held = x_ni.new_empty(7, 2, B, 3, T, H, W)
    more = x_ni.new_empty(MIB // 4 * (64 // recipe.tiles + 16 * recipe.d_trunc + 8 * (not recipe.checkpoint_dit)
                                      + 4 * (not recipe.checkpoint_decoder)))
    return held, more


def by_hand(B=4, T=17, tiles=2, d=1, dit=False, decoder=False, processes=1, shard=False) -> float:
    """MiB: parameters, two moments of what is trained, clips eight times, and the rest of `step`."""
    frozen = 4 / processes if shard else 4
    return (1 + frozen + 2 + 8 * 2 * B * 3 * T * 64 * 64 * 4 / MIB
            + 64 / tiles + 16 * d + 8 * (not dit) + 4 * (not decoder))


@pytest.mark.parametrize("size", [1, 3])
def test_a_step_needs_parameters_moments_and_what_is_alive_at_its_worst_moment(size):
    models = nn.ModuleList([Model()])

    def step(models, x, y):
        a = x.new_empty(size * MIB // 4)
        b = x.new_empty(2 * MIB // 4)
        del a
        return b, x.new_empty(MIB // 4)
    parts = {name: n / MIB for name, n in memory.expected(models, step, (1, 3, 4, 8, 8), "cpu").items()}
    wanted = {"parameters": 1 + 4, "moments": 2, "backward": 0,
              "passing": 2 * 3 * 4 * 64 * 4 / MIB + max(size + 2, 2 + 1)}
    assert parts == pytest.approx(wanted, abs=1e-3), f"{wanted} MiB by hand, {parts}"


def test_what_autograd_holds_for_backward_is_counted_once_at_its_worst_moment_and_without_parameters():
    models, sizes = nn.ModuleList([Model()]), []

    def step(models, x, y):
        w = models[0].trained[: MIB // 8]
        for times in (3, 1):  # the second piece holds less: the first one's peak stays
            a = w
            for _ in range(times):
                a = a.exp()  # holds its result: half a MiB
            (a * a).sum().backward()  # holds a once more, which is counted already
            sizes.append(times / 2)
    parts = memory.expected(models, step, (1, 3, 4, 8, 8), "cpu")
    assert parts["backward"] / MIB == max(sizes) == 1.5, f"{parts['backward']:,} bytes, {max(sizes)} MiB by hand"


@pytest.mark.parametrize("processes", [1, 4])
def test_of_what_is_divided_a_process_keeps_its_part_with_its_gradient_and_moments(processes):
    """Two parameters of 1 MiB, of which one is divided; their gradients stay, whole or in part, and 2 MiB follow."""
    models = nn.ModuleList([nn.Linear(MIB // 4, 1, bias=False) for _ in range(2)])

    def step(models, x, y):
        sum(model.weight.sum() for model in models).backward()
        return x.new_empty(2 * MIB // 4)
    found = memory.expected(models, step, (1, 3, 1, 8, 8), "cpu", models[0].parameters(), processes)
    kept = 1 + 1 / processes
    wanted = {"parameters": kept, "moments": 2 * kept, "passing": kept + 2}
    assert {name: found[name] / MIB for name in wanted} == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_ways_out_are_named_in_order_with_their_values_what_they_need_and_whether_it_fits(monkeypatch, processes):
    free = 85.0
    monkeypatch.setattr(memory, "available", lambda device: int(free * MIB))
    recipe = Recipe()
    model = Model()
    frozen = model.dit.parameters()
    first, *lines = memory.plan(nn.ModuleList([model]), step, recipe, "cpu", processes, frozen).splitlines()
    B, n = 8 // 2 // processes, processes
    wanted = {f"accumulate={8 // n}": by_hand(1), "checkpoint_decoder=True": by_hand(B, decoder=True),
              "checkpoint_dit=True": by_hand(B, dit=True)}
    wanted |= {"shard=True": by_hand(B, processes=n, shard=True)} if n > 1 else {}
    wanted |= {"tiles=4": by_hand(B, tiles=4), "d_trunc=0": by_hand(B, d=0), "frames=9": by_hand(B, 9)}
    assert f"about {by_hand(B) / 1024:.2f} GiB (parameters 0." in first and f"has {free / 1024:.2f}" in first, first
    assert [line.split()[1].rstrip(":") for line in lines] == list(wanted), lines
    for line, (name, need) in zip(lines, wanted.items()):
        assert f"{name}: {need / 1024:.2f} GiB" in line and line.endswith(", which fits") == (need <= free), line


def test_a_way_that_is_none_is_not_named(monkeypatch):
    """Tiles too small for the loss's network, and fewer frames that are padded to as many."""
    def picky(models, recipe, x_ni, x_gt, terms):
        if recipe.tiles > Recipe().tiles:
            raise ValueError("frames of 1x1")
        step(models, recipe, x_ni, x_gt, terms)
    monkeypatch.setattr(memory, "available", lambda device: 1)
    monkeypatch.setitem(memory.LESS, "frames", lambda recipe, processes: recipe.frames + 4)
    ways = memory.plan(nn.ModuleList([Model()]), picky, Recipe(), "cpu")
    assert "--set d_trunc=" in ways and "--set tiles=" not in ways and "--set frames=" not in ways, ways


def test_a_step_that_fits_is_said_to_need_so_much_and_no_way_out_is_named(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 2**30)
    assert memory.plan(nn.ModuleList([Model()]), step, Recipe(), "cpu") == (
        f"a step needs about {by_hand() / 1024:.2f} GiB (parameters 0.00, moments 0.00, backward 0.00, passing "
        f"{(by_hand() - 7) / 1024:.2f}), and cpu has 1.00")


def test_what_is_available_is_the_systems_free_memory_divided_among_the_processes_of_a_machine(monkeypatch):
    page = os.sysconf("SC_PAGE_SIZE")
    whole, unused = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    found = memory.available("cpu")
    assert 0.5 * unused < found <= whole, f"{found:,} bytes; {unused:,} unused of {whole:,}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available("cpu") == pytest.approx(found / 4, rel=0.2), "as other programs come and go"
