"""The ImageNet networks with random weights, as torchvision builds them, for the tests."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from mirage_min.networks.imagenet import FILES
from tests.torchvision_stub import stub

stub()
BUILDERS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}


def torchvision_features(net: str, state: dict | None = None) -> nn.Sequential:
    """torchvision's own `features` with `state`, or with random weights that keep the activations' scale."""
    from torchvision import models

    with torch.device("meta"):  # its classifier alone has a hundred million parameters: never allocate them
        features = getattr(models, BUILDERS[net])(weights=None).features
    features = features.to_empty(device="cpu")
    if state is not None:
        features.load_state_dict(state)
        return features.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in features.parameters():
        fan = p[0].numel() if p.ndim == 4 else 100
        p.data = torch.randn(p.shape, generator=generator) * (2 / fan) ** 0.5
    return features.requires_grad_(False)


def frames(*shape: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Two different batches of smooth colours with some noise, in [-1, 1]."""
    torch.manual_seed(seed)
    coarse = torch.rand(2 * shape[0], 3, 4, 4)
    x = nn.functional.interpolate(coarse, shape[-2:], mode="bicubic").clamp(0, 1) * 2 - 1
    return (x + 0.1 * torch.randn_like(x)).clamp(-1, 1).split(shape[0])


def save_networks(folder: Path) -> Path:
    """Random weights of the three networks, under the names that the package asks for."""
    for net, name in FILES.items():
        save_file(torchvision_features(net).state_dict(), folder / f"{name}.safetensors")
    return folder
