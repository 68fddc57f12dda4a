"""A run as one HTML file: two videos under a slider, the change amplified, tone and flicker of every frame.

    comparison = Comparison("input", "result")
    for x, y in zip(before, after):
        comparison.add(x, y)                             # frames [3, H, W] in [-1, 1]
    write("out.html", "out.mp4", {"": comparison})       # several of them make one page

The page needs nothing else, neither from the network nor from the disk: pictures are JPEGs inside it, curves are SVG.
Memory and file grow with the video by eight numbers a frame only: of a long one every second frame is shown, or every
fourth, and so on. The curves have all frames.

    tone      the means of red, green and blue, of 255
    flicker   how much a pixel differs from the frame before, on average, of 255. Motion counts too, so it says
              something only next to the other video's
    change    grey + GAIN · (y − x), from the frames themselves and not from their JPEGs

    python -m mirage_min.data.report BEFORE AFTER PAGE.html      # of two videos, as infer.py --report does
"""

import base64
import html
import io
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from string import Template

import torch
from PIL import Image
from torch import Tensor

from ..networks.weights import whole_file
from .pixels import to_uint8
from .video import Video

GAIN = 4
SIDE = 640                     # pixels: larger frames are shown shrunk
WIDTH, HEIGHT, LEFT = 640, 150, 40  # of a chart, and of what its numbers take
COLOURS = ("#c33", "#393", "#36c")


@dataclass
class Comparison:
    """Two videos of one size and length, taken in frame by frame; `most` of the frames are shown."""

    left: str
    right: str
    most: int = 48
    count: int = 0
    every: int = 1                                    # one in this many frames is shown
    shown: list[tuple[str, str, str]] = field(default_factory=list)      # left, right and change, as data URLs
    tones: tuple[list, list] = field(default_factory=lambda: ([], []))   # of both, [R, G, B] of each frame
    flicker: tuple[list, list] = field(default_factory=lambda: ([], []))
    moved: float = 0.0                                # sum over frames of the mean |y − x|, of 255
    before: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """The next frame of both, [3, H, W] in [-1, 1]. ValueError for two sizes, NaN and inf."""
        if x.shape != y.shape:
            raise ValueError(f"a report compares frames of one size, got {list(x.shape)} and {list(y.shape)}")
        x, y = (frame.detach().float().cpu() for frame in (x, y))
        if self.count % self.every == 0:
            self.shown.append((picture(x), picture(y), picture(GAIN * (y - x))))
        if len(self.shown) > self.most:
            self.shown = self.shown[::2]
            self.every *= 2
        for side, frame in enumerate((x, y)):
            self.tones[side].append(((frame.mean(dim=(1, 2)) + 1) * 127.5).tolist())
            last = frame if self.before is None else self.before[side]
            self.flicker[side].append(float((frame - last).abs().mean() * 127.5))
        self.moved += float((y - x).abs().mean() * 127.5)
        self.before = x, y
        self.count += 1

    def summary(self) -> str:
        """The change in numbers, a sentence; ValueError without a frame."""
        if not self.count:
            raise ValueError("a report needs a frame at least")
        tones = torch.tensor(self.tones)                                                 # [2, T, 3]
        shift = ", ".join(f"{value:+.1f}" for value in (tones[1] - tones[0]).mean(dim=0).tolist())
        still, moving = (sum(values) for values in self.flicker)
        ratio = f"; flicker is {moving / still:.2f} of {self.left}'s" if still else ""
        return (f"From {self.left} to {self.right} a pixel changes by {self.moved / self.count:.1f} of 255 on average, "
                f"the means of red, green and blue by {shift}{ratio}.")


def compare(left: Path, right: Path) -> Comparison:
    """Two video files, frame by frame. ValueError if they differ in size or length."""
    comparison = Comparison(left.name, right.name)
    with Video(left) as before, Video(right) as after:
        for x, y in zip_longest(before, after):
            if x is None or y is None:
                shorter = left if x is None else right
                longer = right if x is None else left
                raise ValueError(f"{shorter}: ends after {comparison.count} frames, {longer} does not")
            comparison.add(x, y)
    return comparison


def picture(x: Tensor) -> str:
    """A frame [3, H, W] in [-1, 1] -> a JPEG of at most SIDE pixels a side, as a data URL."""
    image, file = Image.fromarray(to_uint8(x)), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


# ---- the page --------------------------------------------------------------------------------------------------------

def write(path: str | Path, title: str, comparisons: dict[str, Comparison], preface: str = "") -> None:
    """Write the page to a file, atomically. comparisons: by heading; preface: text, shown as it is."""
    images: dict[str, int] = {}  # by content: the truth next to several methods is there once
    sections = "".join(section(heading, comparison, images) for heading, comparison in comparisons.items())
    text = PAGE.substitute(title=html.escape(title), preface=f"<pre>{html.escape(preface)}</pre>" if preface else "",
                           sections=sections, images=",\n".join(f'"{url}"' for url in images))
    with whole_file(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # a file's name may be no text


def section(heading: str, comparison: Comparison, images: dict[str, int]) -> str:
    """The HTML of one comparison; its pictures are added to `images`, {data URL: number}."""
    summary = comparison.summary()
    numbers = [" ".join(str(images.setdefault(url, len(images))) for url in urls) for urls in zip(*comparison.shown)]
    tones = [([frame[c] for frame in frames], COLOURS[c], side == 0)
             for side, frames in enumerate(comparison.tones) for c in range(3)]
    flicker = [(values[1:], "#333", side == 0) for side, values in enumerate(comparison.flicker)]
    return SECTION.substitute(
        heading=html.escape(heading), summary=html.escape(summary), left=html.escape(comparison.left),
        right=html.escape(comparison.right), lefts=numbers[0], rights=numbers[1], changes=numbers[2],
        every=comparison.every, last=len(comparison.shown) - 1, frames=comparison.count, gain=GAIN,
        charts=chart("tone, mean of R, G, B", tones, 0) + chart("flicker, frame to frame", flicker, 1))


def chart(title: str, curves: list[tuple[list[float], str, bool]], first: int) -> str:
    """Curves (values, colour, dashed) of frames from `first` on -> SVG; "" where there are no two frames to join."""
    values = [value for curve, _, _ in curves for value in curve]
    frames = first + len(curves[0][0])
    if len(curves[0][0]) < 2:
        return ""
    low, high = min(values), max(values)
    scale = (HEIGHT - 40) / (high - low or 1)

    def point(t: int, value: float) -> str:
        return f"{LEFT + (WIDTH - LEFT - 10) * t / (frames - 1):.1f},{HEIGHT - 20 - (value - low) * scale:.1f}"

    lines = ""
    for curve, colour, dashed in curves:
        points = " ".join(point(t, value) for t, value in enumerate(curve, first))
        kind = ' class="dashed"' if dashed else ""
        lines += f'<polyline points="{points}" stroke="{colour}"{kind}/>'
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" data-frames="{frames}"><text x="{LEFT}" y="12">{html.escape(title)}'
            f'</text><text y="24">{high:.1f}</text><text y="{HEIGHT - 20}">{low:.1f}</text>'
            f'<line class="now" y1="18" y2="{HEIGHT - 18}"/>{lines}<text x="{LEFT}" y="{HEIGHT - 4}">0</text>'
            f'<text x="{WIDTH - 10}" y="{HEIGHT - 4}" text-anchor="end">{frames - 1}</text></svg>\n')


SECTION = Template("""
<section data-left="$lefts" data-right="$rights" data-change="$changes" data-every="$every">
<h2>$heading</h2><p>$summary</p>
<div class="two">
<figure><div class="wipe"><img class="left" alt="$left"><img class="right" alt="$right"></div>
<figcaption>$left <input class="split" type="range" value="50" aria-label="how much of each"> $right</figcaption>
</figure>
<figure><img class="change" alt="change"><figcaption>the change × $gain; grey is none</figcaption></figure>
</div>
<p><button>play</button> <input class="time" type="range" value="0" min="0" max="$last" aria-label="frame">
frame <output>0</output> of $frames</p>
$charts<p class="key">dashed: $left; solid: $right</p>
</section>
""")

PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>$title</title>
<style>
body { font: 16px sans-serif; max-width: 1320px; margin: 1em auto; padding: 0 1em }
.two { display: flex; flex-wrap: wrap; gap: 1em }
figure { margin: 0; flex: 1 1 300px; max-width: 640px }
img { display: block; width: 100% }
.wipe { position: relative; cursor: ew-resize }
.right { position: absolute; inset: 0 }
.time { width: 40% }
svg { width: 100%; max-width: 640px; font-size: 11px }
.now { stroke: #bbb }
polyline { fill: none }
.dashed { stroke-dasharray: 3; opacity: .7 }
.key { color: #666 }
</style>
<h1>$title</h1>$preface
$sections
<script>
const images = [
$images];
for (const section of document.querySelectorAll("section")) {
  const find = name => section.querySelector(name);
  const split = find(".split"), time = find(".time"), every = Number(section.dataset.every);
  const show = () => {
    const frame = time.value * every;
    for (const kind of ["left", "right", "change"])
      find("." + kind).src = images[section.dataset[kind].split(" ")[time.value]];
    find(".right").style.clipPath = `inset(0 0 0 $${split.value}%)`;
    find("output").textContent = frame;
    for (const svg of section.querySelectorAll("svg"))
      for (const end of ["x1", "x2"])
        svg.querySelector(".now").setAttribute(end, LEFT + SPAN * frame / (svg.dataset.frames - 1));
  };
  split.oninput = time.oninput = show;
  find(".wipe").onpointermove = event => {
    split.value = 100 * event.offsetX / event.currentTarget.clientWidth;
    show();
  };
  let playing = null;
  find("button").onclick = event => {
    event.target.textContent = playing ? "play" : "stop";
    playing = playing ? clearInterval(playing) : setInterval(() => {
      time.value = Number(time.value) < Number(time.max) ? Number(time.value) + 1 : 0;
      show();
    }, 120);
  };
  show();
}
</script>
</html>
""".replace("LEFT", str(LEFT)).replace("SPAN", str(WIDTH - LEFT - 10)))


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="One HTML file that compares two videos of one size.")
    for name in ("before", "after", "page"):
        parser.add_argument(name, type=Path, nargs="?")
    args = parser.parse_args()
    try:
        if args.page:
            comparison = compare(args.before, args.after)
            write(args.page, f"{args.before.name}, {args.after.name}", {"": comparison})
        else:
            comparison = Comparison("input", "result", most=4)
            for t in range(10):
                x = torch.linspace(-1, 1, 64).expand(3, 48, 64).roll(t, dims=2)
                comparison.add(x, 0.9 * x + 0.02 * (-1) ** t)
        print(f"{len(comparison.shown)} of {comparison.count} frames are shown, one in {comparison.every}")
        print(comparison.summary())
    except (OSError, ValueError) as error:
        parser.error(str(error))
