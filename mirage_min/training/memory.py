"""The memory of a training step, predicted: the step itself runs on tensors that have no data.

PyTorch's FakeTensors have a shape, a type, a device and a lifetime, but no data. The whole step runs on them: every
network, ChopGrad, losses and every backward. A storage counts from the operation that makes it until nothing refers to
it any more. The estimate is the highest sum, plus AdamW's two moments. It is split into `parameters`, `moments`, what
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
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
LESS = {  # values of settings that take less memory, the least costly first; r: the recipe, n: how many processes
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
    """While entered, counts the bytes of all storages that operations return and something still refers to.

    `count` is the number at present, `peak` the highest. The modules' parameters and buffers are left out.
    """

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.count = self.peak = 0
        self.known = {t.untyped_storage()._cdata for m in modules for t in (*m.parameters(), *m.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and storage_of(tensor)._cdata not in self.known:
                self.add(storage_of(tensor))
        return out

    def add(self, storage: UntypedStorage | Tensor) -> None:
        """Add a storage's bytes to `count`, until nothing refers to it any more."""
        key, size = storage._cdata, bytes_of(storage)
        self.known.add(key)
        self.count += size
        self.peak = max(self.peak, self.count)

        def drop():
            self.known.discard(key)
            self.count -= size
        weakref.finalize(storage, drop)


class SavedBytes:
    """While entered, counts the bytes that autograd holds for backward: `count` at present, `peak` at most.

    A storage counts once, however many tensors share it; those of the module's parameters are left out.
    """

    def __init__(self, module: nn.Module):
        self.parameters = {p.untyped_storage()._cdata for p in module.parameters()}
        self.holders = Counter()  # of each storage, how many SavedTensors hold it
        self.count = self.peak = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: SavedTensor(self, t), lambda s: s.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def storage_of(tensor: Tensor) -> UntypedStorage | Tensor:
    """What holds its numbers: its storage; itself in oneDNN's layout, which shows none."""
    return tensor if tensor.layout == torch._mkldnn else tensor.untyped_storage()


def bytes_of(storage: UntypedStorage | Tensor) -> int:
    """Bytes of what storage_of gives."""
    return storage.nbytes if isinstance(storage, Tensor) else storage.nbytes()


class SavedTensor:
    """One tensor that autograd holds; counted until autograd lets go of it."""

    def __init__(self, saved: SavedBytes, tensor: Tensor):
        self.saved = saved
        self.tensor = tensor.detach()
        storage = storage_of(self.tensor)
        self.key = storage._cdata
        self.bytes = 0 if self.key in saved.parameters else bytes_of(storage)
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

    divided   parameters that FSDP2 divides among `processes` processes, with their gradients and moments
    """
    divided_ids = {id(p) for p in divided}
    names = [name for name, p in models.named_parameters() if id(p) in divided_ids]

    def call(fakes: nn.Module) -> None:
        for name in names:
            divide_gradient(fakes.get_parameter(name), processes)
        step(fakes, *torch.empty(2, *size, device=device))

    peak, backward = rehearse(models, call, device)
    parameters = sum(t.nbytes for t in (*models.parameters(), *models.buffers()))
    moments = sum(2 * p.nbytes for p in models.parameters() if p.requires_grad)
    passing = peak - parameters - backward
    for p in map(models.get_parameter, names):
        elsewhere = p.nbytes - p.nbytes // processes
        parameters -= elsewhere
        moments -= 2 * elsewhere if p.requires_grad else 0
    return {"parameters": parameters, "moments": moments, "backward": backward, "passing": passing}


def divide_gradient(p: nn.Parameter, processes: int) -> None:
    """As soon as p has its gradient, reduce that to the share which one of `processes` processes keeps."""
    kept = []

    def keep_share(p: nn.Parameter) -> None:
        kept[:] = [p.new_empty(-(-p.numel() // processes))]
        p.grad = None
    if p.requires_grad and processes > 1:
        p.register_post_accumulate_grad_hook(keep_share)


def rehearse(models: nn.Module, call: Callable[[nn.Module], None], device: str) -> tuple[int, int]:
    """Run call(models) without data -> the bytes alive at its peak, and those that autograd holds at most.

    The first number includes the models' parameters and buffers.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    live = LiveBytes()
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
    """Empty every functools cache in the networks' modules: real runs must not find tables made of fake tensors."""
    package = __name__.rpartition(".training")[0] + ".networks."
    for name, module in list(sys.modules.items()):
        if name.startswith(package):
            for function in vars(module).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()


def available(device: str) -> int:
    """Bytes that this process may use on the device: those that are free and, on a GPU, those it already holds."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: all that is installed
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def plan(models: nn.ModuleList, step: Callable, recipe, device: str, processes: int = 1,
         divided: Iterable[nn.Parameter] = ()) -> str:
    """A text: how many GiB step(models, recipe, x_ni, x_gt, terms) needs in one process, and how many it may use.

    If it needs more, a line follows for each setting that takes less.

    divided   parameters that are divided among the processes if the recipe has shard=True
    """
    divided = list(divided)

    def needs(r) -> dict[str, int]:
        clips = max(1, r.batch // (processes * r.accumulate))
        once = partial(one_step, step=step, recipe=r)
        size = clips, 3, r.frames, r.height, r.width
        sharded = divided if getattr(r, "shard", False) else ()
        return expected(models, once, size, device, divided=sharded, processes=processes)

    parts = needs(recipe)
    need = sum(parts.values())
    free = available(device)
    shares = ", ".join(f"{name} {n / GIB:.2f}" for name, n in parts.items())
    text = f"a step needs about {need / GIB:.2f} GiB ({shares}), and {device} has {free / GIB:.2f}"
    if need <= free:
        return text
    text += ": it will not fit. With one setting changed it needs"
    for key, change in LESS.items():
        if not hasattr(recipe, key):
            continue
        value = change(recipe, processes)
        if value == getattr(recipe, key):
            continue
        try:
            less = sum(needs(dataclasses.replace(recipe, **{key: value})).values())
        except (ValueError, RuntimeError):  # the step cannot run so: tiles too small for the loss's network, say
            continue
        if less < need:
            text += f"\n    --set {key}={value}: {less / GIB:.2f} GiB" + ", which fits" * (less <= free)
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
