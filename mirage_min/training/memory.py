"""The memory of a training step, worked out before there is one: the step itself runs on tensors that have no data.

PyTorch's FakeTensors have a shape, a type, a device and a lifetime, and no storage. The whole step runs on them:
encoders, transformer, ChopGrad, losses and every backward; a storage counts from the operation that makes it until
nothing refers to it any more, and the estimate is the highest sum. To it come AdamW's two moments. Not counted is what
single operations need while they run (cuDNN's workspaces, a few per cent) and what the allocator wastes. Of the sum it
says how much are parameters, moments and activations that autograd holds for backward; the rest lives in passing.

    python -m mirage_min.training.memory
"""

import copy
import dataclasses
import os
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..networks import dit_cogvideox, dit_cosmos, dit_wan

GIB = 2**30
TABLES = (dit_cogvideox.rotary_table, dit_cogvideox.sincos_table, dit_cosmos.rotary_table, dit_wan.rotary_table)
LESS = {  # what can be changed in a recipe, in the order in which it is cheapest to give up
    "accumulate": lambda r, n: r.batch // n, "checkpoint_decoder": lambda r, n: True,
    "checkpoint_dit": lambda r, n: True, "shard": lambda r, n: n > 1, "tiles": lambda r, n: 2 * r.tiles,
    "d_trunc": lambda r, n: 0, "frames": lambda r, n: r.frames // 2 + 1}


class Live(TorchDispatchMode):
    """Counts the bytes of all storages met while it is entered and still referred to: `now`, and their `peak`.

    The modules' parameters and buffers do not count.
    """

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.now, self.peak = 0, 0
        self.known = {t.untyped_storage()._cdata for m in modules for t in (*m.parameters(), *m.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def drop():
            self.known.discard(key)
            self.now -= size
        weakref.finalize(storage, drop)


class Held:
    """Counts the bytes that autograd holds for backward while it is entered: `now`, and their `peak`.

    Every storage counts once, for as long as it is held; those of the module's parameters do not count.
    """

    def __init__(self, module: nn.Module):
        self.parameters = {p.untyped_storage()._cdata for p in module.parameters()}
        self.times, self.now, self.peak = Counter(), 0, 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: Saved(self, t), lambda saved: saved.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


class Saved:
    """One tensor in the hands of autograd; counted until autograd lets go of it."""

    def __init__(self, held: Held, tensor: Tensor):
        self.held, self.tensor = held, tensor.detach()
        storage = tensor.untyped_storage()
        self.key, self.bytes = storage._cdata, 0 if storage._cdata in held.parameters else storage.nbytes()
        held.times[self.key] += 1
        if held.times[self.key] == 1:
            held.now += self.bytes
            held.peak = max(held.peak, held.now)

    def __del__(self):
        self.held.times[self.key] -= 1
        if self.held.times[self.key] == 0:
            self.held.now -= self.bytes


def expected(models: nn.ModuleList, step: Callable, size: tuple[int, ...], device: str) -> dict[str, int]:
    """Bytes of `step(models, x_ni, x_gt)` at its worst moment, for clips [B, 3, T, H, W], by what they are.

    parameters (with buffers); moments, AdamW's; backward, what autograd holds for it at most; passing, all else.
    """
    fake, live = FakeTensorMode(allow_non_fake_inputs=True), Live()
    try:
        with fake, live:
            memo = {id(p): nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
                    for p in models.parameters()}
            memo |= {id(b): torch.empty_like(b, device=device) for b in models.buffers()}
        fakes = copy.deepcopy(models, memo)  # deepcopy takes every tensor from the memo: nothing is copied
        with fake, live, Held(fakes) as held:
            step(fakes, *torch.empty(2, *size, device=device))
    finally:
        for table in TABLES:  # or the fake ones would be found there later
            table.cache_clear()
    parts = {"parameters": sum(t.nbytes for t in (*models.parameters(), *models.buffers())),
             "moments": sum(2 * p.nbytes for p in models.parameters() if p.requires_grad), "backward": held.peak}
    return parts | {"passing": live.peak + parts["moments"] - sum(parts.values())}


def available(device: str) -> int:
    """Bytes that this process may use on the device: what is free, and what its own weights already take there."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except OSError:  # not Linux: what is installed
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def plan(models: nn.ModuleList, gradients: Callable, recipe, processes: int, device: str) -> str:
    """What a step of gradients(models, recipe, x_ni, x_gt, terms) needs; if it cannot fit, a line for each way out.

    The first of the models is the Mirage.
    """
    def needs(r) -> dict[str, int]:
        def step(models, *clips):
            gradients(models, r, *(models[0].pad(x) for x in clips), defaultdict(float))
        size = (max(1, r.batch // (processes * r.accumulate)), 3, r.frames, r.height, r.width)
        parts = expected(models, step, size, device)
        if getattr(r, "shard", False):
            frozen = sum(p.nbytes for p in models[0].dit.parameters() if not p.requires_grad)
            parts["parameters"] -= frozen - frozen // processes
        return parts

    parts, there = needs(recipe), available(device)
    need, shares = sum(parts.values()), ", ".join(f"{name} {n / GIB:.2f}" for name, n in parts.items())
    text = f"a step needs about {need / GIB:.2f} GiB ({shares}), and {device} has {there / GIB:.2f}"
    if need <= there:
        return text
    text += ": it will not fit. Single settings make of it"
    for key, change in LESS.items():
        if hasattr(recipe, key) and (value := change(recipe, processes)) != getattr(recipe, key):
            try:
                less = sum(needs(dataclasses.replace(recipe, **{key: value})).values())
            except (ValueError, RuntimeError):  # pieces too small for a network of the loss, say: no way out
                continue
            if less < need:
                text += f"\n    --set {key}={value}: {less / GIB:.2f} GiB" + ", which fits" * (less <= there)
    return text


if __name__ == "__main__":
    def step(layers, x_ni, x_gt):
        (layers(x_ni) - x_gt).square().sum().backward()

    for width in (8, 16):
        layers = nn.ModuleList([nn.Sequential(nn.Conv3d(3, width, 3, padding=1), nn.SiLU(), nn.Conv3d(width, 3, 1))])
        for frames in (9, 33):
            parts = expected(layers, lambda layers, *x: step(layers[0], *x), (1, 3, frames, 480, 832), "cpu")
            print(f"two convolutions, {width:2} channels, {frames:2} frames of 480 x 832: a step needs "
                  f"{sum(parts.values()) / GIB:.2f} GiB, {parts['backward'] / GIB:.2f} of them for backward; "
                  "nothing was computed")
    print(f"available here: {available('cpu') / GIB:.1f} GiB")
