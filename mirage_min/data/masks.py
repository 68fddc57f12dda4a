"""What an inpainting system fills: a mask from a box, a picture or a video. White is filled, black is kept.

    read_mask("40,20,120,80", 96, 144)         # a box x0,y0,x1,y1 in pixels, the same in all frames  -> [1, H, W]
    read_mask("mask.png", 96, 144)             # a picture, the same in all frames                    -> [1, H, W]
    read_mask("mask.mp4", 96, 144)             # a mask for each frame, a folder of pictures too      -> an iterator

A pixel is filled where the mask is nearer to white than to black: a compressed mask has greys along its edges.

    python -m mirage_min.data.masks            # a box and a picture
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .pictures import IMAGES
from .video import Video, read_image

GREY = 0.0  # what a network sees in place of what it is to fill


def read_mask(given: str | Path, H: int, W: int) -> Tensor | Iterator[Tensor]:
    """A mask [1, H, W] of booleans for all frames, or an iterator of one for each, of frames of H x W.

    ValueError naming what was given, if it is of another size, cannot be read, or is a box or a picture that covers
    nothing; single frames of a video may.
    """
    if re.fullmatch(r"-?\d+(,-?\d+){3}", str(given)):
        return box_mask([int(n) for n in str(given).split(",")], H, W)
    path = Path(given)
    if not path.exists():
        raise ValueError(f"{given}: no such file, and not a box x0,y0,x1,y1 of whole pixels")
    if path.is_file() and path.suffix.lower() in IMAGES:
        mask = covered(read_image(path), path, H, W)
        if not mask.any():
            raise ValueError(f"{path}: covers nothing: wanted white where frames are to be filled")
        return mask
    return masks_of_video(path, H, W)


def box_mask(box: list[int], H: int, W: int) -> Tensor:
    """x0, y0, x1, y1 in pixels, x1 and y1 not included -> [1, H, W]. ValueError unless it covers a pixel."""
    x0, y0, x1, y1 = box
    mask = torch.zeros(1, H, W, dtype=torch.bool)
    if not (max(x0, 0) < min(x1, W) and max(y0, 0) < min(y1, H)):
        raise ValueError(f"the box {box} covers nothing of a frame of {W}x{H}: wanted x0,y0,x1,y1")
    mask[:, max(y0, 0) : y1, max(x0, 0) : x1] = True
    return mask


def masks_of_video(path: Path, H: int, W: int) -> Iterator[Tensor]:
    """A mask [1, H, W] for each frame of a video or a folder of pictures."""
    with Video(path) as video:
        for frame in video:
            yield covered(frame, path, H, W)


def covered(frame: Tensor, path: Path, H: int, W: int) -> Tensor:
    """A picture [3, h, w] in [-1, 1] -> [1, h, w], where it is white. ValueError unless it is H x W."""
    h, w = frame.shape[1:]
    if (h, w) != (H, W):
        raise ValueError(f"{path}: wanted a mask as large as the video, {W}x{H}, got {w}x{h}")
    return frame.mean(dim=0, keepdim=True) > 0


def hide(x: Tensor, mask: Tensor) -> Tensor:
    """x [..., H, W] with grey where the mask, which broadcasts to x, is true."""
    # DEVIATION: the paper says neither what its network sees there, nor whether it sees the mask; here it does not
    return torch.where(mask, torch.full_like(x, GREY), x)


if __name__ == "__main__":
    import tempfile

    from PIL import Image

    for row in read_mask("2,1,5,3", 4, 8)[0].int().tolist():
        print("a box    ", *row)
    with tempfile.TemporaryDirectory() as folder:
        Image.linear_gradient("L").resize((8, 2)).rotate(180).save(f"{folder}/mask.png")
        for row in read_mask(f"{folder}/mask.png", 2, 8)[0].int().tolist():
            print("a picture", *row)
    for wrong in ("9,9,12,12", "mask.gif"):
        try:
            read_mask(wrong, 4, 8)
        except ValueError as error:
            print("refused:", error)
