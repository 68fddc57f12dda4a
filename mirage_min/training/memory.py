"""The memory of a training step, predicted: the step itself runs on tensors that have no data.

PyTorch's FakeTensors have a shape, a type, a device and a lifetime, and no storage. The whole step runs on them: every
network, ChopGrad, losses and every backward. A storage counts from the operation that makes it until nothing refers to
it any more; the estimate is the highest sum plus AdamW's two moments. It is split into `parameters`, `moments`, what
autograd holds for `backward`, and the temporary rest, `passing`. The workspaces of single operations (cuDNN's: a few
per cent) and the allocator's waste are not counted.

    python -m mirage_min.training.memory
"""

import copy
import dataclasses
import os
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
LESS = {  # settings that take less memory, the cheapest to give up first; r is the recipe, n the number of processes
    "accumulate": lambda r, n: r.batch // n,
    "checkpoint_decoder": lambda r, n: True,
    "checkpoint_dit": lambda r, n: True,
    "checkpoint_unet": lambda r, n: True,
    "shard": lambda r, n: n > 1,
    "tiles": lambda r, n: 2 * r.tiles,
    "d_trunc": lambda r, n: 0,
    "frames": lambda r, n: r.frames // 2 + 1,
}


class LiveBytes(TorchDispatchMode):
    """While entered, counts the bytes of all storages met and still referred to: `count`, and its `peak`.

    The modules' parameters and buffers do not count.
    """

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.count, self.peak = 0, 0
        self.known = {t.untyped_storage()._cdata for m in modules for t in (*m.parameters(), *m.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage) -> None:
        """Add an untyped storage's bytes to `count`, until nothing refers to it any more."""
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.count += size
        self.peak = max(self.peak, self.count)

        def drop():
            self.known.discard(key)
            self.count -= size
        weakref.finalize(storage, drop)


class SavedBytes:
    """While entered, counts the bytes that autograd holds for backward: `count`, and its `peak`.

    Every storage counts once, for as long as it is held; those of the module's parameters do not count.
    """

    def __init__(self, module: nn.Module):
        self.parameters = {p.untyped_storage()._cdata for p in module.parameters()}
        self.holders, self.count, self.peak = Counter(), 0, 0  # how many hold a storage, by storage

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: SavedTensor(self, t), lambda s: s.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


class SavedTensor:
    """One tensor that autograd holds; counted until autograd lets go of it."""

    def __init__(self, saved: SavedBytes, tensor: Tensor):
        self.saved, self.tensor = saved, tensor.detach()
        storage = tensor.untyped_storage()
        self.key = storage._cdata
        self.bytes = 0 if self.key in saved.parameters else storage.nbytes()
        saved.holders[self.key] += 1
        if saved.holders[self.key] == 1:
            saved.count += self.bytes
            saved.peak = max(saved.peak, saved.count)

    def __del__(self):
        self.saved.holders[self.key] -= 1
        if self.saved.holders[self.key] == 0:
            self.saved.count -= self.bytes


def expected(models: nn.ModuleList, step: Callable, size: tuple[int, ...], device: str,
             divided: Iterable[nn.Parameter] = (), processes: int = 1) -> dict[str, int]:
    """Bytes of step(models, x_ni, x_gt) at its peak, for clips of size (B, 3, T, H, W), by what they hold.

    The keys are parameters (with buffers), moments (AdamW's), backward (what autograd holds at most) and passing (the
    rest, with gradients). Their sum is the estimate.

    divided   parameters of which one of so many processes keeps a part, as of their gradients and moments (FSDP2)
    """
    own = {id(p) for p in divided}
    names = [name for name, p in models.named_parameters() if id(p) in own]

    def call(fakes: nn.Module) -> None:
        for name in names:
            divide_gradient(fakes.get_parameter(name), processes)
        step(fakes, *torch.empty(2, *size, device=device))

    peak, saved = rehearse(models, call, device)
    parts = {"parameters": sum(t.nbytes for t in (*models.parameters(), *models.buffers())),
             "moments": sum(2 * p.nbytes for p in models.parameters() if p.requires_grad), "backward": saved}
    parts["passing"] = peak + parts["moments"] - sum(parts.values())
    for p in map(models.get_parameter, names):
        elsewhere = p.nbytes - p.nbytes // processes
        parts["parameters"] -= elsewhere
        parts["moments"] -= 2 * elsewhere if p.requires_grad else 0
    return parts


def divide_gradient(p: nn.Parameter, processes: int) -> None:
    """Let p keep no more of its gradient, once it is there, than one of so many processes does."""
    kept = []

    def keep_part(p: nn.Parameter) -> None:
        kept[:] = [p.new_empty(-(-p.numel() // processes))]
        p.grad = None
    if p.requires_grad and processes > 1:
        p.register_post_accumulate_grad_hook(keep_part)


def rehearse(models: nn.Module, call: Callable[[nn.Module], None], device: str) -> tuple[int, int]:
    """call(models), in which no tensor has data -> bytes that are alive at its peak, and what autograd holds at most.

    The first number has the models' own parameters and buffers in it.
    """
    fake, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    try:
        with fake, live:
            memo = {id(p): nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
                    for p in models.parameters()}
            memo |= {id(b): torch.empty_like(b, device=device) for b in models.buffers()}
        fakes = copy.deepcopy(models, memo)  # deepcopy takes every tensor from the memo: nothing is copied
        with fake, live, SavedBytes(fakes) as saved:
            call(fakes)
    finally:
        forget_tables()
    return live.peak, saved.peak


def forget_tables() -> None:
    """Empty every functools cache of the networks' modules: a table made on fake tensors would be found there later."""
    package = __name__.rpartition(".training")[0] + ".networks."
    for name, module in list(sys.modules.items()):
        if name.startswith(package):
            for function in vars(module).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()


def available(device: str) -> int:
    """Bytes that this process may use on the device: what is free there and, on a GPU, what it already holds itself."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: what is installed
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def plan(models: nn.ModuleList, step: Callable, recipe, device: str, processes: int = 1,
         divided: Iterable[nn.Parameter] = ()) -> str:
    """A text: what step(models, recipe, x_ni, x_gt, terms) needs in one of the processes, in GiB, and what there is.

    If it needs more than there is, a line follows for each setting that takes less.

    divided: parameters that are divided among the processes where the recipe has shard=True.
    """
    divided = list(divided)

    def needs(r) -> dict[str, int]:
        clips = max(1, r.batch // (processes * r.accumulate))
        once = partial(one_step, step=step, recipe=r)
        size = clips, 3, r.frames, r.height, r.width
        return expected(models, once, size, device, divided if getattr(r, "shard", False) else (), processes)

    parts, there = needs(recipe), available(device)
    need = sum(parts.values())
    shares = ", ".join(f"{name} {n / GIB:.2f}" for name, n in parts.items())
    text = f"a step needs about {need / GIB:.2f} GiB ({shares}), and {device} has {there / GIB:.2f}"
    if need <= there:
        return text
    text += ": it will not fit. Single settings make of it"
    for key, change in LESS.items():
        if not hasattr(recipe, key) or change(recipe, processes) == getattr(recipe, key):
            continue
        value = change(recipe, processes)
        try:
            less = sum(needs(dataclasses.replace(recipe, **{key: value})).values())
        except (ValueError, RuntimeError):  # pieces too small for a network of the loss, say: no way out
            continue
        if less < need:
            text += f"\n    --set {key}={value}: {less / GIB:.2f} GiB" + ", which fits" * (less <= there)
    return text


def one_step(models: nn.ModuleList, x_ni: Tensor, x_gt: Tensor, step: Callable, recipe) -> None:
    """A training script's step, as `expected` calls it; nobody reads its terms."""
    step(models, recipe, x_ni, x_gt, defaultdict(float))


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
