"""Results next to their truth: the videos of a folder, their frames, the actor's boxes and exact flow, all checked.

    python -m mirage_min.data.results         # what of a folder is taken
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import av
import torch
from torch import Tensor

from ..networks import checked, weights
from .pictures import IMAGES, pictures_of
from .pixels import from_bytes
from .place import is_clip
from .video import Video

# Files of these endings are videos, and an error if they do not open; others are if they do.
VIDEOS = {".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".safetensors", ".webm"}

# What torch computes with; 8-bit floats and large unsigned integers it cannot even compare
NUMBERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
           torch.float32, torch.float64}


def videos(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """{name without suffix: path} of the videos, clips and folders of pictures in a folder; and what was passed over.

    Hidden entries (.ipynb_checkpoints, ._clip.mp4, @eaDir) are not part of it. ValueError if there is none.
    """
    found, passed_over = {}, []
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "@")):
            continue
        if not is_video(path):
            passed_over.append(path.name)
            continue
        other = found.setdefault(path.name if path.is_dir() else path.stem, path)
        if other != path:
            raise ValueError(f"{folder}: {other.name} and {path.name} have the same name")
    if not found:
        raise ValueError(f"{folder}: holds no videos, clips or folders of images"
                         + f", but {', '.join(passed_over[:5])}" * bool(passed_over))
    return found, passed_over


def is_video(path: Path) -> bool:
    """Whether a path is a video, a clip or a folder of pictures."""
    if path.is_dir():
        return bool(pictures_of(path))
    if path.suffix.lower() in VIDEOS:
        return True
    if path.suffix.lower() in IMAGES:
        return False
    try:
        with Video(path):
            return True
    except (ValueError, OSError, av.FFmpegError):
        return False


def frames(path: Path, key: str) -> Iterator[Tensor]:
    """The frames [1, 3, 1, H, W] in [-1, 1] of a video, one after another; of a clip those of its tensor `key`.

    ValueError if the video cannot be read, or the clip has no such uint8 tensor.
    """
    if is_clip(path):
        x = tensor(path, key, 3, None, None, None)
        if x.dtype != torch.uint8:
            raise ValueError(f"{path}: wanted a video in uint8, got {x.dtype}")
        yield from (from_bytes(x[None, :, t : t + 1]) for t in range(x.shape[1]))
    else:
        with Video(path) as video:
            yield from (x[None, :, None] for x in video)


def tensor(path: Path, key: str, *shape: int | None) -> Tensor:
    """One tensor of a safetensors file, of finite real numbers, [*shape] (None: any size); ValueError where it is
    missing or has another shape."""
    x = weights.load_tensors(path)[0].get(key)
    if x is None or x.ndim != len(shape) or any(wanted not in (None, n) for wanted, n in zip(shape, x.shape)):
        raise ValueError(f"{path}: wanted {key} {list(shape)}, got {'none' if x is None else list(x.shape)}")
    if x.dtype not in NUMBERS or not x.isfinite().all():
        raise ValueError(f"{path}: {key}: wanted finite real numbers, got {x.dtype}")
    return x


def read_boxes(source: Path, name: str, T: int) -> Tensor:
    """[T, 4] x0, y0, x1, y1 of the actor in pixels; zeros where it is hidden.

    source: a JSON {name: [[x0, y0, x1, y1] or null, one for each frame]}, or a folder of name.safetensors.
    ValueError naming the source and the video, for boxes that are missing or no boxes.
    """
    if source.is_dir():
        boxes = tensor(source / f"{name}.safetensors", "boxes", T, 4).double()
    else:
        rows = weights.read_json(source).get(name)
        if not isinstance(rows, list) or len(rows) != T:
            got = f"{len(rows)} of them" if isinstance(rows, list) else f"{rows!r:.40}"
            raise ValueError(f"{source}: {name}: wanted [x0, y0, x1, y1] or null for each of {T} frames, got {got}")
        rows = checked.value(list[Annotated[Tensor, (4,)] | None], rows, source, name)
        boxes = torch.stack([torch.zeros(4).double() if row is None else row for row in rows])
    if (boxes[:, :2] > boxes[:, 2:]).any():
        t = int((boxes[:, :2] > boxes[:, 2:]).any(dim=1).nonzero()[0])
        raise ValueError(f"{source}: {name}: wanted x0 <= x1 and y0 <= y1, got {boxes[t].tolist()} in frame {t}")
    return boxes


def exact_flow(path: Path, T: int, H: int, W: int) -> tuple[Tensor, Tensor]:
    """`flow` [1, 2, T - 1, H, W] of a clip in pixels, and where it leads to something `visible` [1, 1, T - 1, H, W]."""
    flow = tensor(path, "flow", 2, T - 1, H, W)
    visible = tensor(path, "visible", 1, T - 1, H, W)
    return flow[None].float(), visible[None].bool()


if __name__ == "__main__":
    import tempfile

    from .video import write_clip

    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.mp4", "b"):
            write_clip(Path(folder, name), torch.zeros(3, 2, 32, 48))
        Path(folder, "notes.txt").write_text("a video of my own")
        Path(folder, ".ipynb_checkpoints").mkdir()
        found, passed_over = videos(Path(folder))
        for name, path in found.items():
            print(f"{name}: {path.name}, {len(list(frames(path, 'x_dr')))} frames")
        print("passed over:", ", ".join(passed_over))
