"""What the streams start from: a clip whose object can be shown in another way.

    shot = toy_shot(draws, WorldConfig())                # a made-up scene
    shot = StreetShot(**vars(street.shoot(...)))         # a recorded street with a rendered car
    sample = shot.pair(relit=True, shadowed=False)       # the object in another light, and without its shadow

    python -m mirage_min.data.shots                      # what each of the two switches changes in a made-up scene
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from ..networks.weights import save_tensors
from . import street, toy_world
from .photometric import integer
from .pixels import to_bytes
from .toy_render import Scene
from .toy_world import WorldConfig

SEEDS = 1_000_000      # of made-up scenes; those from here on are held out


@dataclass
class Sample:
    """A pair, and what was done to make it."""

    degraded: Tensor               # [3, T, H, W] in [-1, 1]
    clean: Tensor                  # [3, T, H, W] in [-1, 1]
    actor: Tensor                  # [1, T, H, W] in [0, 1], the object's alpha
    boxes: Tensor                  # [T, 4] x0, y0, x1, y1 in pixels
    flow: Tensor | None = None     # [2, T-1, H, W] pixels (dx, dy) from t to t + 1
    visible: Tensor | None = None  # [1, T-1, H, W] 1 where it is still seen at t + 1
    did: dict | None = None


@dataclass
class ToyShot:
    """A made-up scene: everything in it can be rendered again."""

    scene: Scene
    config: WorldConfig

    def pair(self, relit: bool, shadowed: bool) -> Sample:
        """Clean, and degraded: the object in the light `scene.naive` (relit), with or without its shadow."""
        clip = toy_world.render(self.scene, self.config, True, relit, shadowed)
        return Sample(clip.x_ni, clip.x_gt, clip.actor, clip.boxes, flow=clip.flow, visible=clip.visible)


@dataclass
class StreetShot(street.Shot):
    """A recorded street and the car that is rendered into it."""

    def pair(self, relit: bool, shadowed: bool) -> Sample:
        """As ToyShot's."""
        made = street.insert(**vars(self), relit=relit, shadowed=shadowed)
        return Sample(made.x_ni, made.x_gt, made.actor, made.boxes)


def toy_shot(draws: Generator, config: WorldConfig) -> ToyShot:
    """A made-up scene."""
    return ToyShot(toy_world.sample_scene(integer(draws, SEEDS), config), config)


def save_sample(sample: Sample, path: Path, stream: str) -> None:
    """One safetensors as data/pairs.py reads it; the stream and what it did in its metadata."""
    tensors = {"x_ni": to_bytes(sample.degraded), "x_gt": to_bytes(sample.clean), "boxes": sample.boxes,
               "actor": (sample.actor * 255).round().to(torch.uint8)}
    if sample.flow is not None:
        tensors |= {"flow": sample.flow, "visible": sample.visible}
    save_tensors(path, tensors, {"stream": stream, "did": json.dumps(sample.did)})


if __name__ == "__main__":
    shot = toy_shot(torch.Generator().manual_seed(0), WorldConfig(frames=2, height=48, width=72))
    for relit, shadowed in ((False, True), (True, True), (False, False), (True, False)):
        sample = shot.pair(relit, shadowed)
        far = (sample.degraded - sample.clean).abs().mean(dim=0, keepdim=True) * 127.5
        inside, outside = (float((far * m).sum() / m.sum()) for m in (sample.actor, 1 - sample.actor))
        print(f"relit {relit!s:5} shadowed {shadowed!s:5}: they differ by {inside:4.1f} of 255 on the object, "
              f"{outside:4.1f} elsewhere")
