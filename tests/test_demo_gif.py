"""The README's picture: videos next to each other under their names, in one palette, for ever, at the clip's rate."""

import pytest
import torch
from PIL import Image, ImageSequence

from experiments import demo_gif

H, W, COLOURS = 20, 60, {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def videos():
    """Three videos of one colour each; in frame t the row t is white."""
    found = {}
    for name, colour in COLOURS.items():
        x = torch.tensor(colour).view(3, 1, 1, 1).expand(3, 5, H, W) / 127.5 - 1
        found[name] = torch.where(torch.eye(5, H)[:, :, None] > 0, 1.0, x)
    return found


def test_each_frame_shows_all_videos_in_turn_under_their_names(videos):
    sheets = demo_gif.sheets(videos)
    assert len(sheets) == 5
    for t, sheet in enumerate(sheets):
        assert sheet.size == (3 * W, demo_gif.CAPTION + H)
        for k, colour in enumerate(COLOURS.values()):
            picture = sheet.crop((k * W, demo_gif.CAPTION, (k + 1) * W, demo_gif.CAPTION + H))
            rows = [picture.crop((0, y, W, y + 1)).getcolors() for y in range(H)]
            assert rows == [[(W, (255, 255, 255) if y == t else colour)] for y in range(H)]
            header = sheet.crop((k * W, 0, (k + 1) * W, demo_gif.CAPTION)).convert("L")
            ink = [x for x in range(W) if min(header.crop((x, 0, x + 1, demo_gif.CAPTION)).getdata()) < 128]
            assert 3 <= min(ink) < 7 and max(ink) > 15, f"the name of video {k}, from its left edge"


def test_the_gif_plays_for_ever_at_the_rate_of_the_clip_and_a_still_surface_keeps_its_colour(tmp_path):
    """Six frames whose upper half stays as it is; all the others have colours that only one of four samples has."""
    still = torch.linspace(-1, 1, 40 * 30).view(1, 30, 40).expand(3, -1, -1)
    frames = []
    for t in range(6):
        other = torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(t)) * 2 - 1
        frames.append(demo_gif.sheets({"x": torch.cat([still, other], dim=1)[:, None]})[0])
    demo_gif.save_gif(tmp_path / "docs" / "a.gif", frames, fps=12.5)
    with Image.open(tmp_path / "docs" / "a.gif") as gif:
        assert gif.n_frames == 6 and gif.info["loop"] == 0 and gif.info["duration"] == 80
        shown = [frame.convert("RGB").crop((0, demo_gif.CAPTION, 40, demo_gif.CAPTION + 30)).tobytes()
                 for frame in ImageSequence.Iterator(gif)]
    assert len(set(shown)) == 1, "the still half flickers"


@pytest.mark.parametrize("count", [1, 4, 9])
def test_the_palette_is_of_frames_from_the_whole_clip(tmp_path, count):
    """Each frame has one colour; those that a quarter of the clip lies between are all kept."""
    colours = [(20 * t, 255 - 20 * t, 40) for t in range(count)]
    demo_gif.save_gif(tmp_path / "a.gif", [Image.new("RGB", (8, 6), colour) for colour in colours], fps=10)
    with Image.open(tmp_path / "a.gif") as gif:
        shown = {frame.convert("RGB").getpixel((4, 3)) for frame in ImageSequence.Iterator(gif)}
    for colour in colours[:: max(1, count // 4)]:
        off = min(max(abs(a - b) for a, b in zip(colour, found)) for found in shown)
        assert off <= 2, f"{colour} is not among {shown}"
