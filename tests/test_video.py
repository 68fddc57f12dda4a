"""Video in and out: colours survive; files appear whole or not at all."""

import os
import time
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mirage_min.data.pixels import from_bytes, to_bytes, to_float, to_uint8
from mirage_min.data.video import Format, Video, read_clip, write_clip, writing
from tests.media import HEIGHT, WIDTH, assert_close, copy, encode, picture, pictures, read, yuv_frame

BT601, BT709 = (0.299, 0.114), (0.2126, 0.0722)  # Kr, Kb
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 120, 40),
           (30, 90, 160)]


# ---- pixels ---------------------------------------------------------------------------------------------------------


def test_every_byte_survives_the_way_to_numbers_and_back():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    x = to_float(pixels)
    assert x.shape == (3, 16, 16) and x.min() == -1 and x.max() == 1
    assert (to_uint8(x) == pixels).all()
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0]).view(3, 1, 1)).tolist() == [[[0, 255, 128]]]  # clamped, rounded


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("tag, matrix", [(1, BT709), (6, BT601), (5, BT601)])
def test_pure_colours_are_read_by_their_tags_and_do_not_shift_when_written(tmp_path, tag, matrix, full):
    source = encode(tmp_path / "in.mp4", [yuv_frame(c, matrix, full) for c in COLOURS], colour=(tag, 2 if full else 1),
                    options={"crf": "0"})
    frames, _, video = read(source)
    assert video.format.matrix == tag
    means = frames.mean(axis=(1, 2))
    shift = np.abs(means - COLOURS).max()
    assert shift <= 2, f"read: {shift:.2f} of 255, reference the definition in 8 bits"
    again = read(copy(source, tmp_path / "out.mp4"))[0].mean(axis=(1, 2))
    shift = np.abs(again - means).max()
    assert shift <= 1, f"written and read again: {shift:.2f} of 255"
    with av.open(str(tmp_path / "out.mp4")) as out:
        context = out.streams.video[0].codec_context
        assert (context.colorspace, context.color_range, context.pix_fmt) == (tag, 1, "yuv420p")


@pytest.mark.parametrize("full", [False, True])
def test_the_range_is_also_read_where_the_pixel_format_does_not_tell(tmp_path, full):
    source = encode(tmp_path / "in.webm", [yuv_frame(c, BT601, full) for c in COLOURS], "libvpx-vp9",
                    colour=(6, 2 if full else 1), options={"lossless": "1"})
    shift = np.abs(read(source)[0].mean(axis=(1, 2)) - COLOURS).max()
    assert shift <= 2, f"{shift:.2f} of 255, reference the definition in 8 bits"


@pytest.mark.parametrize("height, matrix", [(576, BT601), (578, BT709)])
def test_without_a_tag_the_matrix_goes_by_the_number_of_lines(tmp_path, height, matrix):
    colour = (200, 120, 40)
    source = encode(tmp_path / "in.mkv", [yuv_frame(colour, matrix, False, height=height, width=16)])
    shift = np.abs(read(source)[0].mean(axis=(0, 1, 2)) - colour).max()
    assert shift <= 2, f"{shift:.2f} of 255"


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_frames_are_delivered_upright(tmp_path, degrees):
    image = picture(3)
    image[: HEIGHT // 2, : WIDTH // 2] = (250, 20, 20)
    source = encode(tmp_path / "in.mp4", [image] * 2, pix_fmt="yuv444p", rotation=degrees,
                    aspect=Fraction(4, 3), options={"crf": "1"})
    frames, _, video = read(source)
    wanted = np.rot90(image, degrees // 90)  # counter-clockwise
    assert_close(frames, [wanted] * 2, 12)
    H, W, C = wanted.shape
    assert (video.format.height, video.format.width) == (H, W)
    assert video.format.aspect == (Fraction(4, 3) if degrees % 180 == 0 else Fraction(3, 4))


def test_the_shape_of_a_pixel_is_carried_over(tmp_path):
    source = encode(tmp_path / "in.mp4", pictures(2), aspect=Fraction(16, 11))
    assert read(copy(source, tmp_path / "out.mp4"))[2].format.aspect == Fraction(16, 11)


@pytest.mark.parametrize("name, mode", [("a.png", "RGB"), ("a.png", "L"), ("a.png", "I;16"), ("a.png", "1"),
                                        ("a.jpg", "RGB"), ("a.jpg", "L"), ("a.webp", "RGB"), ("a.tif", "RGB"),
                                        ("a.bmp", "RGB")])
def test_images_of_every_kind_are_read_at_full_range(tmp_path, name, mode):
    grey = np.linspace(0, 255, WIDTH).round().astype(np.uint8)[None].repeat(HEIGHT, 0)
    image = np.stack([grey] * 3, axis=-1)
    stored = {"RGB": image, "L": grey, "I;16": grey.astype(np.uint16) * 257, "1": grey > 127}[mode]
    Image.fromarray(stored).save(tmp_path / name, quality=100)
    assert_close(read(tmp_path)[0], [image if mode != "1" else np.where(image > 127, 255, 0)], 3)


def test_alpha_is_composited_over_black(tmp_path):
    rgba = np.dstack([picture(20, 32, 48), np.full((32, 48), 255, np.uint8)])
    rgba[:16, :, 3], rgba[16:, :24, 3] = 0, 128
    Image.fromarray(rgba).save(tmp_path / "0.png")
    assert_close(read(tmp_path)[0], [(rgba[..., :3] * (rgba[..., 3:] / 255)).round()], 1)
    palette = Image.fromarray(np.repeat([[1, 0]], 24, axis=1).astype(np.uint8).repeat(32, 0), "P")
    palette.putpalette([200, 100, 50, 10, 220, 30])
    palette.save(tmp_path / "0.png", transparency=1)
    wanted = np.repeat([[[0, 0, 0], [200, 100, 50]]], 24, axis=1).repeat(32, 0)
    assert_close(read(tmp_path)[0], [wanted], 0)


def test_a_jpeg_is_turned_by_its_exif_orientation(tmp_path):
    image = picture(3)
    image[: HEIGHT // 2, : WIDTH // 2] = (250, 20, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    Image.fromarray(image).save(tmp_path / "0.jpg", quality=100, subsampling=0, exif=exif)
    assert_close(read(tmp_path)[0], [np.rot90(image, -1)], 6)


# ---- reading --------------------------------------------------------------------------------------------------------


def test_frames_are_decoded_ahead_but_not_all(tmp_path):
    with Video(encode(tmp_path / "in.mp4", pictures(40)), ahead=4) as video:
        frames = iter(video)
        for _ in range(3):
            next(frames)
        while len(video.times) < 3 + 4:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(video.times) == 3 + 4


def test_a_name_with_colon_and_percent_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip("take:1 100%d.mp4", torch.zeros(3, 2, 16, 16))
    assert read_clip("take:1 100%d.mp4").shape == (3, 2, 16, 16)


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("H, W, pix_fmt", [(16, 16, "yuv420p"), (67, 101, "yuv444p"), (32, 33, "yuv444p")])
def test_any_size_is_written_and_read_again(tmp_path, H, W, pix_fmt):
    x = torch.stack([to_float(p) for p in pictures(5, H, W)], dim=1)
    write_clip(tmp_path / "a.mp4", x, fps=12.5)
    assert_close(read(tmp_path / "a.mp4")[0], pictures(5, H, W), 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.pix_fmt, stream.average_rate, stream.frames) == (pix_fmt, Fraction(25, 2), 5)


def test_a_folder_of_pngs_is_lossless(tmp_path):
    x = torch.stack([to_float(np.random.default_rng(t).integers(0, 255, (17, 19, 3), np.uint8)) for t in range(3)], 1)
    write_clip(tmp_path / "out", x)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert (read_clip(tmp_path / "out") == x).all()


def test_a_link_stays_a_link(tmp_path):
    write_clip(tmp_path / "a.mp4", torch.zeros(3, 1, 16, 16))
    write_clip(tmp_path / "folder", torch.zeros(3, 2, 16, 16))
    for name in ("a.mp4", "folder"):
        (tmp_path / f"to {name}").symlink_to(tmp_path / name)
        write_clip(tmp_path / f"to {name}", torch.ones(3, 1, 16, 16))
        assert (tmp_path / f"to {name}").is_symlink() and read_clip(tmp_path / name).mean() > 0.98


@pytest.mark.parametrize("name", ["a.mp4", "folder"])
def test_what_fails_in_the_middle_leaves_everything_as_it_was(tmp_path, name):
    for before in (False, True):
        if before:
            write_clip(tmp_path / name, torch.zeros(3, 1, 16, 16))
            old = read_clip(tmp_path / name)
        with pytest.raises(KeyboardInterrupt), writing(tmp_path / name, Format(16, 16)) as out:
            for t in range(50):
                out.write(torch.ones(3, 16, 16), t, 1)
            raise KeyboardInterrupt
        assert [p.name for p in tmp_path.iterdir()] == [name] * before
    assert (read_clip(tmp_path / name) == old).all()
    write_clip(tmp_path / name, torch.ones(3, 2, 16, 16))  # and what does not fail takes its place
    assert read_clip(tmp_path / name).mean() > 0.98 and [p.name for p in tmp_path.iterdir()] == [name]


def test_the_writer_says_what_it_does_not_take(tmp_path):
    with pytest.raises(ValueError, match=r"wanted a frame \[3, 16, 32\], got \[3, 32, 16\]"):
        with writing(tmp_path / "a.mp4", Format(32, 16)) as out:
            out.write(torch.zeros(3, 32, 16), 0)
    with pytest.raises(ValueError, match="x264 takes no such settings: .*preset=quick"):
        with writing(tmp_path / "a.mp4", Format(32, 16), preset="quick"):
            pass
    with pytest.raises(ValueError, match="fps must be from 1/1001 to 1000"):
        write_clip(tmp_path / "a.mp4", torch.zeros(3, 1, 16, 16), fps=0.0004)
    assert not list(tmp_path.iterdir())


def test_a_wider_format_writes_wider_frames(tmp_path):
    with writing(tmp_path / "a.mp4", replace(Format(16, 16), width=32)) as out:
        out.write(torch.zeros(3, 16, 32), 0, 1)
    assert read_clip(tmp_path / "a.mp4").shape == (3, 1, 16, 32)


def test_read_clip_reads_no_more_frames_than_are_wanted(tmp_path):
    x = torch.rand(3, 30, 16, 16) * 2 - 1
    write_clip(tmp_path / "a", x)
    (tmp_path / "a" / "000020.png").write_bytes(b"no image")
    assert torch.equal(read_clip(tmp_path / "a", 5), from_bytes(to_bytes(x[:, :5])))
    with pytest.raises(ValueError, match="000020.png"):
        read_clip(tmp_path / "a")


def test_a_folder_that_cannot_be_replaced_comes_back(tmp_path, monkeypatch):
    write_clip(tmp_path / "a", torch.zeros(3, 2, 16, 16))
    replace = os.replace

    def fail(source, target):
        if os.path.basename(source) == "new":
            raise OSError("no")
        replace(source, target)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_clip(tmp_path / "a", torch.ones(3, 2, 16, 16))
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and read_clip(tmp_path / "a").abs().max() < 0.01
    write_clip(tmp_path / "a", torch.ones(3, 1, 16, 16))
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (read_clip(tmp_path / "a") == 1).all()
