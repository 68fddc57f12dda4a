"""Frames from files: in order, at their times, and none lost without being missed."""

from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from mirage_min.data.decode import hidden
from mirage_min.data.video import Video
from tests.media import RATE, WIDTH, assert_close, break_frame, copy, encode, packets_of, picture, pictures, read


def packet_places(path) -> list[int]:
    """Where in a file each packet of its video begins."""
    with av.open(str(path)) as container:
        return [packet.pos for packet in container.demux(video=0) if packet.size]


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
    (tmp_path / "._frame2.png").write_bytes(b"what a Mac leaves beside an image")
    (tmp_path / "1²3.txt").write_text("no image, and no number")
    frames, times, video = read(tmp_path, fps=29.97)
    assert_close(frames, [picture(t % 30) for t in (1, 9, 10, 100)], 0)
    assert video.count == 4 and times[3] == (Fraction(300, 2997), Fraction(100, 2997))


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


@pytest.mark.parametrize("name, codec", [("in.mkv", "libx264"), ("in.webm", "libvpx-vp9")])
def test_a_matroska_file_that_was_cut_off_is_refused_or_filled_up_by_one(tmp_path, name, codec):
    source = encode(tmp_path / name, pictures(20), codec)
    assert len(read(source)[0]) == 20
    source.write_bytes(source.read_bytes()[: packet_places(source)[12]])
    with pytest.raises(ValueError, match=r"frame \d+ \(counted from 0\) does not decode"):
        read(source)
    frames, _, video = read(source, skip_broken=True)
    assert len(frames) == video.broken[-1] + 1 < 20 and (frames[-1] == frames[-2]).all()
    assert_close(frames[:-1], pictures(20)[: len(frames) - 1], 12)


def test_a_matroska_file_that_does_not_know_its_length_is_whole(tmp_path):
    """As a recorder leaves it that could not go back: the Segment's eight bytes of length are all ones (RFC 8794)."""
    source = encode(tmp_path / "in.mkv", pictures(8))
    data = bytearray(source.read_bytes())
    at = data.index(b"\x18\x53\x80\x67") + 4
    assert int.from_bytes(data[at + 1 : at + 8], "big") + at + 8 == len(data)
    data[at : at + 8] = b"\x01" + b"\xff" * 7
    source.write_bytes(data[: packet_places(source)[5]])
    frames, _, video = read(source)
    assert len(frames) < 8 and not video.broken


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
    with pytest.raises(ValueError, match=r"frame 2 \(2.png\) does not decode"):
        read(tmp_path)
    frames, _, video = read(tmp_path, skip_broken=True)
    assert_close(frames, [picture(t) for t in (0, 1, 1, 3)], 0)
    assert video.broken == [2]


@pytest.mark.parametrize("name, settings", [("a.jpg", {}), ("a.jpg", {"progressive": True}), ("a.png", {}),
                                            ("a.webp", {}), ("a.bmp", {}), ("a.tif", {}), ("a.ppm", {})])
def test_half_an_image_is_none(tmp_path, name, settings):
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name, **settings)
    assert len(read(tmp_path)[0]) == 1
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[: (tmp_path / name).stat().st_size // 2])
    with pytest.raises(ValueError, match="holds no frames|does not decode"):
        read(tmp_path)


def test_a_frame_of_another_size_is_refused(tmp_path):
    for t in range(3):
        Image.fromarray(picture(t, width=WIDTH + 2 * (t == 2))).save(tmp_path / f"{t}.png")
    with pytest.raises(ValueError, match=r"frame 2 \(2.png\) is 98x64, the first is 96x64"):
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
