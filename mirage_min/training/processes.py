"""One training run in several processes: which clips each of them has, and how their gradients are summed.

    python train_harmonize.py ...                               # one process
    torchrun --nproc-per-node=8 train_harmonize.py ...          # the same batch, shared by eight

No process is wrapped in DDP: ChopGrad runs several backwards a step, under which DDP is silently wrong. Every clip's
loss is weighted by its share of the whole batch, so gradients just add up: over groups and tiles of a clip, clips,
accumulated pieces, and by one `reduce` over the processes.

    python -m mirage_min.training.processes
"""

import math
import os
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data import desk


def join(device: str) -> None:
    """Join torchrun's other processes, if it started this one: nccl among GPUs, gloo among CPUs."""
    if "WORLD_SIZE" not in os.environ:
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")


def leave() -> None:
    """Leave torchrun's other processes, if `join` joined any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 for the first and for one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes, 1 for one alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Wait until every process has made this call."""
    if dist.is_initialized():
        dist.barrier()


def print_once(*words) -> None:
    """Print the words, with spaces between them, in the first process only."""
    if rank() == 0:
        desk.say(" ".join(map(str, words)))


def pieces(recipe) -> list[range]:
    """This process's clips of the batch 0 .. batch - 1, in recipe.accumulate pieces. ValueError as in `deal`."""
    return deal(recipe.batch, recipe.accumulate, rank(), world())


def deal(batch: int, accumulate: int, process: int, processes: int) -> list[range]:
    """The clips of one process, in `accumulate` pieces: over all processes each of 0 .. batch - 1 once, in order.

    ValueError if the batch does not divide among processes and pieces.
    """
    n, rest = divmod(batch, processes * accumulate)
    if rest or n == 0:
        raise ValueError(f"a batch of {batch} clips does not divide among {processes} processes x "
                         f"accumulate={accumulate}")
    first = process * accumulate
    return [range(i * n, (i + 1) * n) for i in range(first, first + accumulate)]


@torch.no_grad()
def reduce(params: dict[str, nn.Parameter], terms: dict[str, Tensor | float]) -> None:
    """Add up, over all processes and in place, the gradients and the terms of the loss: one all_reduce.

    A parameter without a gradient counts as zeros. Every process must have the same parameters and terms. The gradients
    of what `shard` divided are sums already.
    """
    if world() == 1:
        return
    like = next(iter(params.values()))
    params = {name: p for name, p in params.items() if not is_divided(p)}
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params.values()]
    values = torch.stack([torch.as_tensor(v, device=like.device, dtype=torch.float64) for v in terms.values()])
    flat = torch.cat([g.flatten() for g in grads] + [values.to(like.dtype)])
    dist.all_reduce(flat)
    *sums, values = flat.split([p.numel() for p in params.values()] + [len(terms)])
    for p, total in zip(params.values(), sums):
        p.grad = total.view_as(p)
    terms.update(zip(terms, values))


def check_finite(step: int, terms: dict[str, Tensor | float], norm: Tensor, clips: list[str]) -> None:
    """ValueError before a step that would spoil the weights, naming what is not finite and this step's clips.

    terms and norm: the loss's terms and the gradient's norm, numbers or tensors [].
    """
    values = {name: float(value) for name, value in {**terms, "gradient norm": norm}.items()}
    if all(map(math.isfinite, values.values())):
        return
    named = [clips]
    if world() > 1:
        named = [None] * world()
        dist.all_gather_object(named, clips)
    raise ValueError(f"step {step}: not finite: " + ", ".join(f"{k} {v:g}" for k, v in values.items())
                     + f"; clips: {', '.join(sum(named, []))}; the last checkpoint is as it was")


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------

def shard(network: nn.Module, device: str, trained: bool = False) -> None:
    """FSDP2: every process keeps its part of the weights and fetches a block's while that block runs.

    Blocks are what the network's own ModuleLists hold. What is trained stays whole in every process, so that `reduce`,
    checkpoints and files know nothing of sharding; unless `trained`: then it is divided, too, with its gradients and
    moments. The network has other parameters afterwards, of the same names. A process that is alone does nothing.
    """
    if world() == 1:
        return
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    # of the group that there is: with gloo some versions of init_device_mesh make another one, of nccl, for GPUs
    mesh = DeviceMesh.from_group(dist.group.WORLD, torch.device(device).type)
    whole = set() if trained else {p for p in network.parameters() if p.requires_grad}
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of in-place changes of its output: none here
    blocks = [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]
    for module in (*blocks, network):
        fully_shard(module, mesh=mesh, ignored_params=whole)
        module.set_gradient_divide_factor(1.0)  # the sum over processes, as of everything else; its own is the mean


def is_divided(tensor: Tensor) -> bool:
    """Whether `shard` has divided this tensor among the processes: a DTensor, whose class takes long to import."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A divided tensor put together, any other as it is. Every process must ask."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def to_first(tensor: Tensor) -> Tensor | None:
    """The same in the first process, on the CPU if it was divided; None in the others. Every process must ask."""
    found = whole(tensor)
    if rank() > 0:
        return None
    return found.cpu() if is_divided(tensor) else found


def like_part(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of `like` and, where that is divided, this process's part of it."""
    tensor = tensor.to(like.device)
    if not is_divided(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # each has it: none is sent


def whole_network(network: nn.Module) -> nn.Module | None:
    """The network without sharding, in the first process; None in the others. Every process must ask."""
    if not any(map(is_divided, network.parameters())):
        return network if rank() == 0 else None
    state = {name: to_first(tensor) for name, tensor in network.state_dict().items()}
    if rank() > 0:
        return None
    with torch.device("meta"):
        found = type(network)(network.config)  # of the class as it was: FSDP2 sees to it
    found.load_state_dict(state, assign=True)
    return found


if __name__ == "__main__":
    for process in range(3):
        own = [list(piece) for piece in deal(batch=12, accumulate=2, process=process, processes=3)]
        print(f"clips of process {process} of 3, in two pieces:", *own)
