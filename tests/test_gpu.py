"""On a GPU everything comes out as on the CPU: `pytest -m gpu` on a machine that has one; skipped by name elsewhere."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from mirage_min.method import chopgrad, lora
from mirage_min.networks.weights import load_tensors, save_tensors
from mirage_min.training import processes
from tests import small

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that this torch can use")]


@pytest.fixture(autouse=True)
def full_precision():
    """TF32 would multiply with 10 bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def clip(T: int = 9) -> torch.Tensor:
    return torch.rand(1, 3, T, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.25)])
def test_a_mirage_gives_the_frames_that_it_gives_on_a_cpu(dtype, tolerance):
    wanted = small.mirage().double()(clip().double())
    got = small.mirage().to("cuda", dtype)(clip().to("cuda", dtype)).cpu().double()
    difference = (got - wanted).abs().max().item() / wanted.std().item()
    assert difference <= tolerance, f"{dtype}: largest difference {difference:.1e} of the output's deviation"


@torch.no_grad()
def test_a_stream_gives_as_many_frames_as_it_takes():
    frames = list(clip(21)[0].cuda().unbind(1))
    wanted = list(small.mirage().stream(iter(clip(21)[0].unbind(1))))
    got = list(small.mirage().cuda().stream(iter(frames)))
    assert len(got) == len(wanted) == 21
    difference = max((a.cpu() - b).abs().max().item() for a, b in zip(got, wanted, strict=True))
    assert difference <= 1e-3, f"largest difference {difference:.1e}"


def test_chopgrads_gradient_is_that_of_a_cpu():
    z = torch.randn(1, 4, 5, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradient(device: str) -> torch.Tensor:
        vae = small.parts()[0].double().to(device).requires_grad_(False)
        return chopgrad.backward(vae, z.to(device), lambda x, start: x.square().mean())[1].cpu()

    wanted, got = gradient("cpu"), gradient("cuda")
    difference = ((got - wanted).abs().max() / wanted.abs().max()).item()
    assert difference <= 1e-9, f"largest difference {difference:.1e} of the largest gradient"


# ---- two processes of one card ---------------------------------------------------------------------------------------

def trained_a_little(device: str) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """A small transformer in float64 and its adapters, which alone are trained and change something already."""
    dit = small.parts()[1].double().requires_grad_(False)
    lora.add(dit, "harmonisation", 2, 2)
    trained = {name: p for name, p in dit.named_parameters() if p.requires_grad}
    draws = torch.Generator().manual_seed(7)
    for p in trained.values():
        p.data = torch.randn(p.shape, generator=draws, dtype=torch.float64) / 10
    return dit.to(device), trained


def gradients(dit: torch.nn.Module, trained: dict[str, torch.nn.Parameter], clips: range, device: str) -> dict:
    """Of the mean of a loss over two clips, what these clips add to it."""
    z = torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    text = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)
    for k in clips:
        (dit(z[k : k + 1], 199, text).square().mean() / 2).backward()
    return {name: p.grad for name, p in trained.items()}


def worker(rank: int, folder: Path, device: str) -> None:
    """One of two processes: the frozen weights are shared out, one clip is this process's."""
    # not nccl, which refuses two processes of one card
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    dit, trained = trained_a_little(device)
    whole = sum(p.numel() for p in dit.parameters())
    processes.shard(dit, device)
    own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in dit.parameters())
    terms = {"loss": 0.0}
    gradients(dit, trained, processes.deal(2, 1, rank, 2)[0], device)
    processes.reduce(trained, terms)
    found = {name: p.grad.cpu() for name, p in trained.items()}
    save_tensors(folder / f"{rank}.safetensors", found, {"share": str(own / whole)})
    dist.barrier()
    dist.destroy_process_group()


def check_two_processes(folder: Path, device: str) -> None:
    """Each has the gradients that one process has of both clips, and about half of the frozen weights."""
    mp.start_processes(worker, (folder, device), nprocs=2, start_method="spawn")
    wanted = gradients(*trained_a_little("cpu"), range(2), "cpu")
    for rank in range(2):
        found, about = load_tensors(folder / f"{rank}.safetensors")
        assert found.keys() == wanted.keys() and len(found) > 4
        for name, grad in wanted.items():
            difference = ((found[name] - grad).abs().max() / grad.abs().max()).item()
            assert difference <= 1e-9, f"process {rank}, {name}: {difference:.1e} of the largest gradient"
        assert float(about["share"]) < 0.75, "the frozen weights are shared out"


def test_fsdp2_in_two_processes_of_one_card_gives_the_gradients_of_one_on_a_cpu(tmp_path):
    check_two_processes(tmp_path, "cuda")
