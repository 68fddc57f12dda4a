"""Frames from files: in order, at their times, and none lost without being missed."""

import os
import random
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from mirage_min.data.video import Video
from tests.media import (
    HEIGHT,
    RATE,
    WIDTH,
    assert_close,
    break_frame,
    copy,
    encode,
    field_pictures,
    packets_of,
    picture,
    pictures,
    read,
    remux,
    times_of_decoding,
)


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


# ---- packets and frames ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.ts"])
def test_two_fields_in_two_packets_are_one_frame(tmp_path, name):
    """PAFF, as AVCHD and 1080i broadcasts have it: ten packets at 50 a second, five frames at 25."""
    levels = [50, 90, 130, 170, 210]
    (tmp_path / "raw.h264").write_bytes(b"".join(field_pictures(levels)))
    source = remux(tmp_path / "raw.h264", tmp_path / name, lambda n, content, pts, dts: (content, n * 24000, n * 24000))
    with av.open(str(source)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 10
    frames, times, video = read(source)
    wanted = [np.full((64, 64, 3), (level - 16) * 255 / 219) for level in levels]
    assert_close(frames, wanted, 1)
    assert [t for t, _ in times] == [Fraction(t, 25) for t in range(5)] and not video.broken


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx265"), ("a.mov", "libx264"), ("a.mkv", "libx264"),
                                         ("a.mkv", "libx265"), ("a.mkv", "mpeg2video")])
def test_b_frames_whose_packets_have_times_of_decoding_alone_are_shown_in_order(tmp_path, name, codec):
    options = {"bf": "2", "b_strategy": "0", "x265-params": "bframes=2:b-adapt=0:log-level=none"}
    whole = encode(tmp_path / f"whole{name[1:]}", pictures(9), codec, options=options)
    frames, times, video = read(times_of_decoding(whole, tmp_path / name))
    assert_close(frames, pictures(9), 12)
    steps = {float(b - a) for (a, _), (b, _) in zip(times, times[1:])}
    assert len(steps) == 1 and steps.pop() > 0 and not video.broken, times


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.3gp", "a.avi"])
def test_a_picture_that_is_not_coded_repeats_the_one_before_and_is_not_missed(tmp_path, name):
    """MPEG-4 part 2, 6.2.5: vop_coded = 0, as XviD and phones write it; the frames around keep their times."""
    whole = encode(tmp_path / "whole.avi", pictures(5), "mpeg4", options={"g": "1"})

    def change(number, content, pts, dts):  # a P-VOP at this time, a marker, and the bit that says "not coded"
        return (bytes([0, 0, 1, 0xB6, 0x50 + number, 0x9F]) if number in (2, 3) else content), pts, dts
    frames, times, video = read(remux(whole, tmp_path / name, change))
    assert np.abs(frames.mean(axis=(1, 2, 3)) - [picture(t).mean() for t in (0, 1, 4)]).max() < 2
    assert [t for t, _ in times] == [Fraction(t, RATE) for t in (0, 1, 4)] and not video.broken


@pytest.mark.parametrize("name, codec, pix_fmt", [("a.mov", "mjpeg", "yuvj420p"), ("a.mp4", "libx264", "yuv420p")])
def test_a_sample_of_no_bytes_leaves_the_frame_before_where_it_is(tmp_path, name, codec, pix_fmt):
    source = encode(tmp_path / name, pictures(5), codec, pix_fmt, options={"g": "1", "bf": "0"})
    with av.open(str(source)) as container:
        place, size = next((p.pos, p.size) for p in container.demux(video=0) if p.pts and p.size and p.pts > 1024)
    data = bytearray(source.read_bytes())
    table = data.index(b"stsz") + 16 + 4 * 2
    assert int.from_bytes(data[table : table + 4], "big") == size
    data[table : table + 4] = bytes(4)
    mdat = data.index(b"mdat") - 4
    data[mdat : mdat + 4] = (int.from_bytes(data[mdat : mdat + 4], "big") - size).to_bytes(4, "big")
    del data[place : place + size]
    source.write_bytes(data)
    frames, times, video = read(source)
    assert [t for t, _ in times] == [Fraction(t, RATE) for t in (0, 1, 3, 4)] and not video.broken
    assert_close(frames, [pictures(5)[t] for t in (0, 1, 3, 4)], 12)


# ---- which video ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mov", "a.mkv"])
def test_of_several_videos_the_default_is_read_and_named(tmp_path, name):
    with av.open(str(tmp_path / name), "w") as out:
        streams = [out.add_stream("libx264", rate=RATE, options={"bf": "0"}) for _ in range(2)]
        for stream, side, default in zip(streams, (32, 64), (False, True)):
            stream.width = stream.height = side
            stream.disposition = Disposition.default if default else Disposition(0)
        for t in range(5):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(picture(t, stream.height, stream.width), format="rgb24")
                frame.pts = t
                out.mux(stream.encode(frame))
        for stream in streams:
            out.mux(stream.encode())
    frames, times, video = read(tmp_path / name)
    assert frames.shape == (5, 64, 64, 3) and len(video.notes) == 1
    assert f"{name}: holds 2 videos; read is the one of 64x64" in video.notes[0]
    assert not read(encode(tmp_path / "one.mkv", pictures(2)))[2].notes


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_the_alpha_of_a_webm_is_over_black(tmp_path, codec):
    rows = np.where(np.arange(WIDTH) < WIDTH // 2, 0, 255).astype(np.uint8)[None].repeat(HEIGHT, 0)
    with av.open(str(tmp_path / "a.webm"), "w") as out:
        stream = out.add_stream(codec, rate=RATE, options={"auto-alt-ref": "0", "crf": "4", "b": "2M"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuva420p"
        stream.metadata["alpha_mode"] = "1"
        for t in range(5):
            frame = av.VideoFrame.from_ndarray(np.dstack([picture(20 + t), rows]), format="rgba")
            frame = frame.reformat(format="yuva420p")
            frame.pts = t
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    frames, times, _ = read(tmp_path / "a.webm")
    assert [t for t, _ in times] == [Fraction(t, RATE) for t in range(5)]
    assert frames[:, :, : WIDTH // 2 - 8].max() <= 2, "what is transparent shows its hidden colour"
    right = np.stack([picture(20 + t) for t in range(5)])[:, :, WIDTH // 2 + 8 :]
    assert np.abs(frames[:, :, WIDTH // 2 + 8 :] - right).mean() < 4


MATRICES = {  # the first two rows of a display matrix, a b u c d v -> what is to be shown (ISO 14496-12, 8.3.2)
    (-1, 0, 0, 0, 1, 0): np.fliplr, (1, 0, 0, 0, -1, 0): np.flipud, (-1, 0, 0, 0, -1, 0): lambda x: np.rot90(x, 2),
    (0, 1, 0, 1, 0, 0): lambda x: x.transpose(1, 0, 2),
    (0, -1, 0, -1, 0, 0): lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    (0, 1, 0, -1, 0, 0): lambda x: np.rot90(x, -1), (0, -1, 0, 1, 0, 0): np.rot90, (0, 0, 0, 0, 0, 0): lambda x: x,
}


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_a_display_matrix_turns_and_mirrors_as_players_do(tmp_path, matrix):
    image = picture(3)
    image[: HEIGHT // 2, : WIDTH // 4] = (250, 20, 20)
    source = encode(tmp_path / "in.mp4", [image] * 2, pix_fmt="yuv444p", aspect=Fraction(4, 3), options={"crf": "1"})
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # after version, flags, times, id, duration, layer, group and volume
    data[at : at + 24] = b"".join((65536 * value).to_bytes(4, "big", signed=True) for value in matrix)
    source.write_bytes(data)
    frames, _, video = read(source)
    wanted = MATRICES[matrix](image)
    assert_close(frames, [wanted] * 2, 12)
    assert video.format.aspect == (Fraction(4, 3) if wanted.shape == image.shape else Fraction(3, 4))


def test_a_square_video_on_its_side_has_its_pixels_on_their_side_too(tmp_path):
    image = picture(3, 64, 64)
    source = encode(tmp_path / "in.mp4", [image] * 2, rotation=90, aspect=Fraction(4, 3))
    assert read(source)[2].format.aspect == Fraction(3, 4)


# ---- clocks and tags ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts"])
def test_a_recording_that_keeps_the_broadcasts_clock_starts_at_zero_with_its_sound(tmp_path, name):
    source = encode(tmp_path / name, pictures(10), sound="aac", start=36_000 * RATE)
    out = copy(source, tmp_path / "out.mp4")
    frames, times, _ = read(out)
    assert len(frames) == 10 and times[0][0] < Fraction(1, 10) and sum(times[-1]) - times[0][0] == 1
    assert abs(packets_of(out, "audio")[0][0]) < 0.1 and abs(packets_of(out, "audio")[-1][0] - 1) < 0.15


def test_a_gap_of_more_than_seconds_in_a_broadcast_is_closed_for_picture_and_sound(tmp_path):
    one, two = (encode(tmp_path / f"{start}.ts", pictures(10), sound="aac", start=start) for start in (0, 5000 * RATE))
    (tmp_path / "in.ts").write_bytes(one.read_bytes() + two.read_bytes())
    frames, times, video = read(copy(tmp_path / "in.ts", tmp_path / "out.mp4"))
    assert_close(frames, pictures(10) * 2, 12)
    assert [t - times[0][0] for t, _ in times] == [Fraction(t, RATE) for t in range(20)]
    sound = [t for t, _ in packets_of(tmp_path / "out.mp4", "audio")]
    assert abs(sound[-1] - 2) < 0.2 and max(np.diff(sound)) < 0.1, f"sound until second {sound[-1]:.2f}"


def test_a_recorder_that_names_no_rate_is_not_taken_for_a_thousand_frames_a_second(tmp_path):
    """MediaRecorder's WebM: x264 would claim a level that few decoders have."""
    times = [0, 946, 992, 1062, 1085, 1108, 1143, 1213, 1248, 1282, 1317, 1375]
    source = encode(tmp_path / "in.webm", pictures(12), "libvpx", pts=times, time_base=Fraction(1, 1000))
    data = bytearray(source.read_bytes())
    at = data.index(b"\x23\xe3\x83")  # the track's DefaultDuration becomes a Void of the same length
    n = data[at + 3] & 0x7F
    data[at : at + 4 + n] = bytes([0xEC, 0x80 | (2 + n)]) + bytes(2 + n)
    source.write_bytes(data)
    frames, found, video = read(source)
    assert video.format.rate == Fraction(11 * 1000, 1375)
    assert [t for t, _ in found] == [Fraction(t, 1000) for t in times]
    with av.open(str(copy(source, tmp_path / "out.mp4"))) as out:
        assert out.streams.video[0].codec_context.level <= 22


@pytest.mark.parametrize("name", ["a.avi", "a.mkv", "a.mp4", "a.mov"])
@pytest.mark.parametrize("title", ["\u6620\u753b".encode("shift-jis"), "caf\u00e9".encode("latin-1")])
def test_tags_in_any_encoding_are_no_reason_to_refuse_a_video(tmp_path, name, title):
    plain = encode(tmp_path / f"plain{name[1:]}", pictures(5))
    with av.open(str(plain)) as given, av.open(str(tmp_path / name), "w") as out:
        out.metadata["title"] = "t" * len(title)
        stream = out.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    data = (tmp_path / name).read_bytes()
    assert data.count(b"t" * len(title)) >= 1
    (tmp_path / name).write_bytes(data.replace(b"t" * len(title), title))
    assert_close(read(tmp_path / name)[0], pictures(5), 12)


# ---- what is not opened ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, text", [
    ("list.mp4", "ffconcat version 1.0\nfile clip.mp4\n"), ("list.ffconcat", "ffconcat version 1.0\nfile clip.mp4\n"),
    ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"),
    ("list.mpd", '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period></Period></MPD>'),
    ("list.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"),
    ("notes.txt", "many words " * 99)])
def test_a_text_that_names_other_files_or_hosts_is_no_video(tmp_path, name, text):
    clip = encode(tmp_path / "clip.mp4", pictures(2))
    (tmp_path / name).write_text(text.format(clip))
    with pytest.raises(ValueError, match=f"{name}: cannot be read as video"):
        Video(tmp_path / name)


def test_a_name_with_a_pattern_is_that_file_and_a_pattern_is_none(tmp_path):
    for level, name in ((50, "b%d.png"), (200, "b0.png"), (120, "b*.png")):
        Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(tmp_path / name)
    assert sorted(read(tmp_path)[0].mean(axis=(1, 2, 3)).round().tolist()) == [50, 120, 200]
    assert read(tmp_path / "b%d.png")[0].mean() == 50 and read(tmp_path / "b*.png")[0].mean() == 120
    for pattern in ("%04d.png", "c*.png"):
        with pytest.raises(ValueError, match="No such file"):
            Video(tmp_path / pattern)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes in the file system")
def test_a_pipe_or_a_device_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", "/dev/null", "/dev/zero"):
        with pytest.raises(ValueError, match="is no file"):
            Video(path)
    (tmp_path / "pictures").mkdir()
    os.mkfifo(tmp_path / "pictures" / "0.png")
    with pytest.raises(ValueError, match=r"frame 0 \(0.png\) does not decode"):
        Video(tmp_path / "pictures")


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


# ---- what damage may do ---------------------------------------------------------------------------------------------


def spoilt(data: bytes, draws: random.Random) -> bytes:
    """Bits flipped, bytes overwritten, left out or cut off."""
    spoilt, at = bytearray(data), draws.randrange(len(data))
    size = min(len(data) - at, draws.choice([1, 4, 40, 200, 600]))
    kind = draws.choice(["flip", "flip", "zero", "junk", "drop", "cut"])
    if kind == "flip":
        spoilt[at] ^= 1 << draws.randrange(8)
    elif kind == "drop":
        del spoilt[at : at + size]
    else:
        spoilt[at : at + size] = {"zero": bytes(size), "junk": draws.randbytes(size), "cut": b""}[kind]
    return bytes(spoilt[:at] if kind == "cut" else spoilt)


@pytest.mark.parametrize("name, codec, options, movflags", [
    ("a.mkv", "libx264", {"bf": "2"}, ""), ("a.webm", "libvpx", {}, ""), ("a.webm", "libvpx-vp9", {}, ""),
    ("a.avi", "mpeg4", {}, ""), ("a.mp4", "libx265", {"x265-params": "log-level=none"}, ""),
    ("a.ts", "libx264", {}, ""), ("a.mov", "libx264", {"bf": "0"}, ""), ("a.flv", "libx264", {}, ""),
    ("a.mp4", "libx264", {}, "frag_every_frame+empty_moov")])
def test_a_damaged_file_gives_all_its_frames_or_says_that_it_does_not(tmp_path, name, codec, options, movflags):
    noise = np.random.default_rng(0)
    frames = [(p + noise.integers(0, 30, p.shape)).clip(0, 255).astype(np.uint8) for p in pictures(12)]
    container = {"movflags": movflags} if movflags else {}
    source = encode(tmp_path / name, frames, codec, options=options, container=container)
    data, draws = source.read_bytes(), random.Random(0)
    refused, path = 0, tmp_path / f"spoilt{name[1:]}"
    for number in range(20):
        path.write_bytes(spoilt(data, draws))
        try:
            with Video(path) as video:
                count = sum(1 for _ in video)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            continue
        assert count >= 12, f"input {number}: {count} of 12 frames, and nothing was said"
    assert refused >= 5, "the damage was too small to test anything"


def test_a_byte_put_into_the_header_of_an_avi_hides_no_frames(tmp_path):
    """libav then does not find the index, and looks for packets where they are not: it reads 11 of 12."""
    source = encode(tmp_path / "in.avi", pictures(12), "mpeg4", sound="mp3", options={"g": "6"})
    data, path = source.read_bytes(), tmp_path / "spoilt.avi"
    assert len(read(source)[0]) == 12
    at = data.index(b"JUNK") + 40
    path.write_bytes(data[:at] + b"x" + data[at:])
    with pytest.raises(ValueError, match="does not decode"):
        read(path)


def test_a_frame_that_has_a_time_and_no_place_in_a_mov_is_missed(tmp_path):
    """In stts there are 12; stco, of one sample a chunk with this sound, has lost one."""
    source = encode(tmp_path / "in.mov", pictures(12), "mjpeg", "yuvj420p", sound="aac")
    assert len(read(source)[0]) == 12
    data = bytearray(source.read_bytes())
    count = data.index(b"stco") + 8
    assert int.from_bytes(data[count : count + 4], "big") == 12
    data[count : count + 4] = (11).to_bytes(4, "big")
    source.write_bytes(data)
    with pytest.raises(ValueError, match="frame 11 "):
        read(source)
    assert len(read(source, skip_broken=True)[0]) == 12


def test_a_frame_that_an_edit_list_hides_is_not_missed(tmp_path):
    source = encode(tmp_path / "in.mp4", pictures(12), options={"bf": "0", "g": "1"})
    data = bytearray(source.read_bytes())
    at = data.index(b"elst") + 12                         # the first edit: its length, where it begins, its rate
    length = int.from_bytes(data[at : at + 4], "big")
    data[at : at + 4] = (length * 6 // 12).to_bytes(4, "big")
    source.write_bytes(data)
    frames, _, video = read(source)
    assert len(frames) == 6 and not video.broken
