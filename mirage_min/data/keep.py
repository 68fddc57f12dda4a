"""Keep a result only inside given boxes: everywhere else a frame stays exactly as it was.

    y = x + w · (system(x) − x),   w = 1 inside a box, falling to 0 towards its border, and 0 outside

A system that harmonises an insertion also moves the rest of the frame a little (R3D2-BIG: 34 to 37 dB). Whoever knows
where the insertion is, shadow and reflections included, keeps the change there and nowhere else.

The boxes are a JSON file as evaluate.py reads them: {NAME: an entry for each frame} or, for one video, the list alone.
An entry is null, one box [x0, y0, x1, y1] in pixels, or a list of boxes. A box may reach beyond the frame, not lie
outside it; where it reaches the border of the frame, its edge is not softened.

    python -m mirage_min.data.keep
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from ..networks import checked, weights

Box = Annotated[Tensor, (4,)]  # x0, y0, x1, y1


def read_boxes(path: str | Path, name: str) -> list[Tensor]:
    """The boxes of the video called `name`: for each frame [K, 4], K from 0 on. ValueError naming file and entry."""
    path = Path(path)
    with weights.one_line(path):
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(entries, dict):
        if name not in entries:
            raise ValueError(f"{path}: has no boxes for {name!r}, but for {', '.join(map(repr, sorted(entries)[:5]))}")
        entries = entries[name]
    if not isinstance(entries, list):
        raise ValueError(f"{path}: wanted a list with an entry for each frame, got {type(entries).__name__}")
    return [read_entry(entry, path, f"frame {i}") for i, entry in enumerate(entries)]


def read_entry(entry, path: Path, field: str) -> Tensor:
    """null, a box or a list of boxes -> [K, 4]; ValueError naming the file and the field."""
    found = checked.value(Box | list[Box] | None, entry, path, field)
    if isinstance(found, Tensor):
        found = [found]
    boxes = torch.stack(found) if found else torch.zeros(0, 4, dtype=torch.float64)
    if not (boxes[:, :2] < boxes[:, 2:]).all():
        raise ValueError(f"{path}: {field}: wanted x0 < x1 and y0 < y1, got {boxes.tolist()}")
    return boxes


def weight(boxes: Tensor, H: int, W: int, edge: float) -> Tensor:
    """boxes [K, 4] in pixels -> w [1, H, W] in [0, 1]: over `edge` pixels inside a box's border it rises linearly.

    Where a box is narrower than four edges, a quarter of it is its edge. ValueError for a box outside the frame.
    """
    w = torch.zeros(1, H, W)
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (H, W))
    for x0, y0, x1, y1 in boxes.tolist():
        if x1 <= 0 or y1 <= 0 or x0 >= W or y0 >= H:
            raise ValueError(f"the box {[x0, y0, x1, y1]} lies outside the frame of {W}x{H}")
        across, down = rise(x, x0, x1, W, edge), rise(y, y0, y1, H, edge)
        w = torch.maximum(w, torch.outer(down, across).float()[None])
    return w


def rise(pixels: Tensor, start: float, stop: float, n: int, edge: float) -> Tensor:
    """Weights [n] along one axis of n pixels with the centres `pixels` [n]: 0 outside start .. stop, 1 well inside."""
    inside = (pixels > start) & (pixels < stop)
    soft = max(min(edge, (stop - start) / 4), 1e-9)
    left = (pixels - start) / soft if start > 0 else torch.ones_like(pixels)
    right = (stop - pixels) / soft if stop < n else torch.ones_like(pixels)
    return torch.minimum(left, right).clamp(0, 1) * inside


def keep(harmonise: Callable, frames: Iterable[Tensor], boxes: list[Tensor], edge: float) -> Iterator[Tensor]:
    """harmonise(frames), a stream, kept inside `boxes` (read_boxes). Frames [3, H, W] in [-1, 1].

    ValueError where there are more or fewer frames than entries.
    """
    waiting = deque()  # frames that the system has not yet given back, with their weights

    def remembered() -> Iterator[Tensor]:
        count = 0
        for x in frames:
            if count == len(boxes):
                raise ValueError(f"there are boxes for {len(boxes)} frames, and the video has more")
            waiting.append((x, weight(boxes[count], *x.shape[-2:], edge)))
            count += 1
            yield x
        if count < len(boxes):
            raise ValueError(f"there are boxes for {len(boxes)} frames, and the video has {count}")

    for y in harmonise(remembered()):
        x, w = waiting.popleft()
        yield torch.lerp(x, y, w)


if __name__ == "__main__":
    frames = [torch.zeros(3, 24, 48)] * 3
    boxes = [torch.tensor([[8.0, 4.0, 40.0, 20.0]]), torch.zeros(0, 4), torch.tensor([[-5.0, 10.0, 20.0, 30.0]])]
    brighter = lambda stream: (x + 0.5 for x in stream)  # noqa: E731
    for i, y in enumerate(keep(brighter, frames, boxes, edge=4)):
        row = " ".join(f"{v:.2f}" for v in y[0, 16, ::4].tolist())
        print(f"frame {i}, boxes {boxes[i].int().tolist()}: row 16, every fourth pixel: {row}")
