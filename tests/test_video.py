"""Video in and out: frames, colours, times and sound survive; damage is noticed; files appear whole or not at all."""

import time
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image

from mirage_min.decode import hidden
from mirage_min.video import Format, Video, read_clip, to_float, to_uint8, write_clip, writing
from tests.media import HEIGHT, RATE, WIDTH, break_frame, encode, packets_of, picture, pictures, yuv_frame

BT601, BT709 = (0.299, 0.114), (0.2126, 0.0722)  # Kr, Kb
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 120, 40),
           (30, 90, 160)]


def bytes_of(x):
    """[3, T, H, W] in [-1, 1] -> float [T, H, W, 3], 0 to 255."""
    return ((x + 1) * 127.5).permute(1, 2, 3, 0).double().round(decimals=3).numpy()


def read(path, **settings):
    """A video -> its frames [T, H, W, 3], 0 to 255, their times and durations in seconds, and the closed Video."""
    with Video(path, **settings) as video:
        frames = bytes_of(torch.stack(list(video), dim=1))
        times = [(pts * video.format.time_base, duration * video.format.time_base) for pts, duration in video.times]
    return frames, times, video


def copy(source, target, sound=True, **settings):
    with Video(source) as video, writing(target, video.format, sound=source if sound else None, **settings) as out:
        for frame in video:
            out.write(frame, *video.times.popleft())
    return target


def assert_close(frames, wanted, tolerance):
    wanted = np.stack(wanted).astype(float)
    assert frames.shape == wanted.shape
    difference = np.abs(frames - wanted).max()
    assert difference <= tolerance, f"largest difference {difference:.2f} of 255, tolerance {tolerance}"


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


# ---- order and time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mov", "libx265"), ("a.mkv", "libx264"),
                                         ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.ts", "libx264")])
def test_every_container_gives_its_frames_in_order_at_their_times(tmp_path, name, codec):
    frames, times, video = read(encode(tmp_path / name, pictures(17), codec, options={"bf": "2"}))
    assert np.abs(np.diff(frames.mean(axis=(1, 2, 3))) - 6).max() < 2, "a frame is missing, double or out of order"
    assert [t for t, _ in times] == [Fraction(t, RATE) for t in range(17)]
    assert video.format.rate == RATE and video.count == 17 and not video.broken


def test_irregular_times_survive_to_the_last_duration(tmp_path):
    pts = [3, 4, 8, 9, 20, 31, 32, 60, 61, 100]
    source = encode(tmp_path / "in.mkv", pictures(10), pts=[5 * t for t in pts], time_base=Fraction(1, 1000))
    wanted = [Fraction(5 * t, 1000) for t in pts]
    _, times, _ = read(source)
    assert [t for t, _ in times] == wanted
    assert [t for t, _ in read(copy(source, tmp_path / "out.mp4"))[1]] == wanted
    with av.open(str(tmp_path / "out.mp4")) as out:
        assert Fraction(out.duration, av.time_base) == sum(times[-1]) - wanted[0], "end of the last frame"


def test_a_gif_keeps_its_frames_and_delays(tmp_path):
    images = [Image.fromarray(np.full((33, 47, 3), v, np.uint8)) for v in (10, 80, 160, 240)]
    images[0].save(tmp_path / "in.gif", save_all=True, append_images=images[1:], duration=[50, 120, 70, 400])
    frames, times, _ = read(copy(tmp_path / "in.gif", tmp_path / "out.mp4"))
    assert_close(frames, [np.asarray(image) for image in images], 2)
    assert [t for t, _ in times] == [Fraction(t, 100) for t in (0, 5, 17, 24)]
    with av.open(str(tmp_path / "out.mp4")) as out:
        assert out.duration == 0.64 * av.time_base, "the last frame stands for 0.4 s"


def test_times_that_are_not_stored_rise_evenly(tmp_path):
    for name, rate in (("a.avi", RATE), ("a.h264", 25)):  # one has those of decoding, the other has none at all
        source = encode(tmp_path / name, pictures(12), options={"bf": "3"})
        assert [t for t, _ in read(source)[1]] == [Fraction(t, rate) for t in range(12)], name


@pytest.mark.parametrize("codec, pix_fmt", [("mjpeg", "yuvj420p"), ("ffv1", "yuv420p")])
def test_an_avi_that_leaves_frames_out_keeps_the_times_of_the_others(tmp_path, codec, pix_fmt):
    pts = [0, 1, 2, 5, 6, 9]  # as cameras do that cannot keep up: a chunk of no bytes in place of a frame
    source = encode(tmp_path / "in.avi", pictures(6), codec, pix_fmt, pts=pts)
    assert [t for t, _ in read(copy(source, tmp_path / "out.mp4"))[1]] == [Fraction(t, RATE) for t in pts]


@pytest.mark.parametrize("codec, tolerance", [("aac", 1e-3), ("mp2", 0.03)])  # encoded as AAC: which starts 21 ms early
def test_a_broadcast_stream_starts_at_zero_and_in_time_with_its_sound(tmp_path, codec, tolerance):
    source = encode(tmp_path / "in.ts", pictures(20), sound=codec, start=1000)
    out = copy(source, tmp_path / "out.mp4")
    offset = packets_of(source, "audio")[0][0] - packets_of(source)[0][0]
    assert 0 <= packets_of(out)[0][0] < 0.1
    assert packets_of(out, "audio")[0][0] - packets_of(out)[0][0] == pytest.approx(offset, abs=tolerance)


@pytest.mark.parametrize("codec", ["aac", "mp2"])
def test_times_rise_where_the_clock_of_a_stream_jumps_back(tmp_path, codec):
    source = encode(tmp_path / "in.ts", pictures(10), sound=codec)
    source.write_bytes(source.read_bytes() * 2)  # as recorders join their files
    copy(source, tmp_path / "out.mp4")
    frames, times, _ = read(tmp_path / "out.mp4")
    assert_close(frames, pictures(10) * 2, 8)
    assert [t - times[0][0] for t, _ in times] == [Fraction(t, RATE) for t in range(20)]


def test_a_clip_trimmed_by_its_edit_list_is_not_taken_for_a_broken_one(tmp_path):
    source = encode(tmp_path / "in.mp4", pictures(30), options={"g": "10", "bf": "2"},
                    shift=25 * 1024, time_base=Fraction(1, RATE * 1024), pts=[1024 * t for t in range(30)])
    frames, times, video = read(source)
    assert_close(frames, pictures(30)[25:], 5)
    assert [t for t, _ in times] == [Fraction(t, RATE) for t in range(5)] and not video.broken


def test_a_clip_that_an_edit_list_ends_early_is_not_taken_for_a_broken_one(tmp_path):
    source = encode(tmp_path / "in.mp4", pictures(30), options={"bf": "2"})
    data = bytearray(source.read_bytes())
    at = data.index(b"elst") + 12  # after name, version and count: how long the one entry is, in milliseconds
    assert int.from_bytes(data[at : at + 4], "big") == 3000
    data[at : at + 4] = (1000).to_bytes(4, "big")
    source.write_bytes(data)
    frames, _, video = read(source)
    assert len(frames) == 10 and not video.broken


def test_a_clip_cut_out_of_a_stream_loses_only_what_refers_to_before_the_cut(tmp_path):
    options = {"x265-params": "keyint=8:min-keyint=8:open-gop=1:bframes=3:b-adapt=0:scenecut=0:log-level=none"}
    source = encode(tmp_path / "whole.mkv", pictures(24), "libx265", options=options)
    with av.open(str(source)) as whole, av.open(str(tmp_path / "cut.mkv"), "w") as cut:
        packets = [packet for packet in whole.demux(video=0) if packet.dts is not None]
        second = [i for i, packet in enumerate(packets) if packet.is_keyframe][1]
        stream, first = cut.add_stream_from_template(whole.streams.video[0], opaque=True), packets[second].pts
        assert min(packet.pts for packet in packets[second:]) < first, "no frame before the key frame: nothing to test"
        for packet in packets[second:]:
            packet.stream = stream
            cut.mux(packet)
    frames, _, video = read(tmp_path / "cut.mkv")
    assert_close(frames, pictures(24)[first // (1000 // RATE) :], 8)
    assert not video.broken


def test_images_come_in_natural_order_and_other_files_are_passed_over(tmp_path):
    for t in (10, 9, 1, 100):
        Image.fromarray(picture(t % 30)).save(tmp_path / f"frame{t}.png")
    (tmp_path / "frame2.txt").write_text("no image")
    frames, times, video = read(tmp_path, fps=29.97)
    assert_close(frames, [picture(t % 30) for t in (1, 9, 10, 100)], 0)
    assert video.count == 4 and times[3] == (Fraction(300, 2997), Fraction(100, 2997))


def test_frames_are_decoded_ahead_but_not_all(tmp_path):
    with Video(encode(tmp_path / "in.mp4", pictures(40)), ahead=4) as video:
        frames = iter(video)
        for _ in range(3):
            next(frames)
        time.sleep(0.3)
        assert 3 < len(video.times) <= 3 + 4


def test_a_name_with_colon_and_percent_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip("take:1 100%d.mp4", torch.zeros(3, 2, 16, 16))
    assert read_clip("take:1 100%d.mp4").shape == (3, 2, 16, 16)


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, codec, junk", [("a.mp4", "libx264", False), ("a.mp4", "libx264", True),
                                               ("a.mkv", "libx264", True), ("a.mov", "mpeg4", True),
                                               ("a.mp4", "libx265", True), ("a.webm", "libvpx-vp9", True),
                                               ("a.avi", "libx264", True)])
def test_a_frame_that_does_not_decode_is_named_and_repeated_on_request(tmp_path, name, codec, junk):
    source = encode(tmp_path / name, pictures(12), codec, options={"g": "4", "bf": "0", "x265-params": "bframes=0"}
                    if codec == "libx265" else {"g": "4"} if codec == "libvpx-vp9" else {"g": "4", "bf": "0"})
    break_frame(source, 7, junk)
    with pytest.raises(ValueError, match=r"frame 7 \(counted from 0\) does not decode"):
        read(source)
    frames, times, video = read(source, skip_broken=True)
    assert video.broken[0] == 7
    assert np.abs(np.diff(frames.mean(axis=(1, 2, 3)))[:6] - 6).max() < 2 and (frames[7] == frames[6]).all()
    assert [t for t, _ in times] == [Fraction(t, RATE) for t in range(12)]


def test_with_b_frames_the_number_is_that_of_showing(tmp_path):
    source = encode(tmp_path / "in.mp4", pictures(16), options={"bf": "3", "b_strategy": "0"})
    with pytest.raises(ValueError, match="frame 5 "):
        read(break_frame(source, 5))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_file_that_was_cut_off_is_refused_or_filled_up(tmp_path, ahead):
    source = encode(tmp_path / "in.mp4", pictures(20), options={"bf": "3", "b_strategy": "0"},
                    container={"movflags": "faststart"})
    with av.open(str(source)) as container:
        places = [(packet.pts, packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    # cut in the middle of a packet whose frame is shown after that of the next, or not
    i = next(i for i in range(8, 20) if (places[i][0] > places[i + 1][0]) == ahead)
    source.write_bytes(source.read_bytes()[: places[i][1] + places[i][2] // 2])
    with pytest.raises(ValueError, match=r"frame \d+ \(counted from 0\) does not decode"):
        read(source)
    frames, times, video = read(source, skip_broken=True)
    last = max(set(range(20)) - set(video.broken))
    assert len(frames) == 20 and last < 19 and (frames[last + 1 :] == frames[last]).all()
    assert_close(frames[: video.broken[0]], pictures(20)[: video.broken[0]], 8)
    assert [t for t, _ in times] == [Fraction(t, RATE) for t in range(20)]


def test_a_reference_frame_that_vp8_never_shows_is_not_missed(tmp_path):
    source = encode(tmp_path / "in.webm", pictures(8), "libvpx", options={"auto-alt-ref": "0"})
    data = bytearray(source.read_bytes())
    at = data.index(packets_of(source)[5][1])
    data[at] &= ~0x10  # the bit that says "show"
    source.write_bytes(data)
    frames, times, video = read(source)
    assert len(frames) == 7 and not video.broken and Fraction(5, RATE) not in [t for t, _ in times]


@pytest.mark.parametrize("codec, first, discarded, wanted", [
    ("vp8", 0b1_001_0, False, False), ("vp8", 0b0_001_1, False, True), ("vp8", 0b1_000_1, True, True),
    ("vp9", 0b0_001_1, False, False)])
def test_the_fifth_bit_of_a_vp8_frame_says_that_it_is_for_showing(codec, first, discarded, wanted):
    """RFC 6386, 9.1: one bit that no key frame has, three of the version, then show_frame; not so in other codecs."""
    class Packet(bytes):
        is_discard, stream, size = discarded, SimpleNamespace(name=codec), 4
    for rest in (0, 255):
        assert hidden(Packet([first, rest, rest, rest])) == wanted, f"{codec}, {first:05b}, then {rest}"


def test_a_broken_image_is_named_and_repeated_on_request(tmp_path):
    for t in range(4):
        Image.fromarray(picture(t)).save(tmp_path / f"{t}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="frame 2 "):
        read(tmp_path)
    frames, _, video = read(tmp_path, skip_broken=True)
    assert_close(frames, [picture(t) for t in (0, 1, 1, 3)], 0)
    assert video.broken == [2]


def test_a_frame_of_another_size_is_refused(tmp_path):
    for t in range(3):
        Image.fromarray(picture(t, width=WIDTH + 2 * (t == 2))).save(tmp_path / f"{t}.png")
    with pytest.raises(ValueError, match="frame 2 is 98x64, the first is 96x64"):
        read(tmp_path)


def test_what_holds_no_video_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.mp4").write_text("hello" * 99)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder").mkdir()
    for name in ("sound.mp4", "sound with cover.mp4"):
        with av.open(str(tmp_path / name), "w") as out:
            stream = out.add_stream("aac", rate=48000, layout="mono")
            if "cover" in name:
                cover = out.add_stream("png", width=16, height=16, pix_fmt="rgb24")
                cover.disposition = Disposition.attached_pic
                out.mux(cover.encode(av.VideoFrame(16, 16, "rgb24")))
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 48000
            out.mux(stream.encode(frame) + stream.encode())
    for name, wanted in [("text.mp4", "cannot be read as video"), ("empty.mp4", "cannot be read as video"),
                         ("none.mp4", "No such file"), ("folder", "holds no frames"), ("sound.mp4", "holds no video"),
                         ("sound with cover.mp4", "holds no video")]:
        with pytest.raises(ValueError, match=wanted) as error:
            Video(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("H, W, pix_fmt", [(16, 16, "yuv420p"), (67, 101, "yuv444p"), (32, 33, "yuv444p")])
def test_any_size_is_written_and_read_again(tmp_path, H, W, pix_fmt):
    x = torch.stack([to_float(p) for p in pictures(5, H, W)], dim=1)
    write_clip(tmp_path / "a.mp4", x, fps=12.5)
    assert_close(bytes_of(read_clip(tmp_path / "a.mp4")), pictures(5, H, W), 8)
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
    with pytest.raises(ValueError, match="fps must be above 0"):
        write_clip(tmp_path / "a.mp4", torch.zeros(3, 1, 16, 16), fps=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, codec", [("a.mp4", "aac"), ("a.mkv", "libopus"), ("a.mp4", "libmp3lame"),
                                         ("a.mkv", "flac")])
def test_sound_is_copied_packet_for_packet(tmp_path, name, codec):
    source = encode(tmp_path / name, pictures(15), sound=codec)
    out = copy(source, tmp_path / "out.mp4")
    wanted, given = packets_of(source, "audio"), packets_of(out, "audio")
    assert [content for _, content in given] == [content for _, content in wanted] and len(wanted) > 5
    assert max(abs(a - b) for (a, _), (b, _) in zip(wanted, given)) <= 1e-3, "seconds"


def test_sound_that_mp4_players_do_not_know_becomes_aac(tmp_path):
    source = encode(tmp_path / "in.mkv", pictures(15), sound="pcm_s16le")
    with av.open(str(copy(source, tmp_path / "out.mp4"))) as out:
        stream = out.streams.audio[0]
        assert (stream.name, stream.rate, stream.layout.name) == ("aac", 48000, "stereo")
        wave = np.concatenate([frame.to_ndarray()[0] for frame in out.decode(stream) if frame.pts >= 0])
    tone = np.sin(np.arange(48000 * 15 // RATE) * (2 * np.pi * 440 / 48000)) / 4
    assert len(wave) >= len(tone), "the end is missing"
    wave = wave[: len(tone)]
    error = np.sqrt(np.mean((wave[4000:-4000] - tone[4000:-4000]) ** 2)) / tone.std()
    assert error < 0.1, f"the tone came back with an error of {error:.3f} of its own size"


def test_sound_of_a_file_that_was_cut_off_ends_there(tmp_path):
    source = encode(tmp_path / "in.mp4", [np.random.default_rng(t).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
                                          for t in range(20)], sound="aac", container={"movflags": "faststart"})
    data = source.read_bytes()
    source.write_bytes(data[: len(data) * 6 // 10])
    with Video(source, skip_broken=True) as video, writing(tmp_path / "out.mp4", video.format, sound=source) as out:
        for frame in video:
            out.write(frame, *video.times.popleft())
    assert len(packets_of(tmp_path / "out.mp4")) == 20
    assert 3 < len(packets_of(tmp_path / "out.mp4", "audio")) < 90


def test_a_wider_format_writes_wider_frames(tmp_path):
    with writing(tmp_path / "a.mp4", replace(Format(16, 16), width=32)) as out:
        out.write(torch.zeros(3, 16, 32), 0, 1)
    assert read_clip(tmp_path / "a.mp4").shape == (3, 1, 16, 32)
