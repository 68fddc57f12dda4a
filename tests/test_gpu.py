"""On a GPU everything comes out as on the CPU: `pytest -m gpu` on a machine that has one; skipped by name elsewhere."""

import pytest
import torch

from mirage_min.method import chopgrad
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
