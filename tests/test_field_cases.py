"""What users of peer software reported, by number: with the files that they or we made of it, which are in
../shared/cases, or (from 50 on) with inputs made here.

Each kind has its own test as well, where it is read (test_decode, test_pictures, test_sound, test_scene, test_splat,
test_evaluate, test_build_pairs, test_weights, test_adapters, test_desk, test_place). Here the reported files themselves
have their right values; without them these tests skip. 34 (an empty asset) and 35 (shards of float16) have no files of
their own: they are in test_build_pairs and test_weights.
"""

import json
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mirage_min.data.results import read_boxes
from mirage_min.data.scene_cameras import read_cameras
from mirage_min.data.splat import Gaussians, load_ply, save_ply
from mirage_min.data.video import Video, write_clip
from tests import scripts, small
from tests.media import assert_close, copy, encode, picture, pictures, read, remux

ROOT = Path(__file__).parents[1]
CASES = ROOT.parent / "shared" / "cases"
reported = pytest.mark.skipif(not CASES.is_dir(), reason=f"needs {CASES}")


def seconds(name: str) -> list[float]:
    """The times of a case's frames."""
    return [round(float(time), 3) for time, _ in read(CASES / name)[1]]


@reported
@pytest.mark.parametrize("folder", ["ffmpeg", "imageio", "pillow_with_dpi", "real_exif_samples_Arbitro",
                                    "real_libheif_rgb"])
def test_01_tiffs_of_a_folder_are_their_pixels(folder):
    frames, _, _ = read(CASES / "01_tiff_folder" / folder)
    file = next((CASES / "01_tiff_folder" / folder).iterdir())
    assert np.abs(frames - np.asarray(Image.open(file).convert("RGB"))[None]).max() == 0


@reported
@pytest.mark.parametrize("folder", ["exif_junk", "exif_prefix", "iccp_junk"])
def test_02_pngs_with_odd_metadata_are_read(folder):
    assert len(read(CASES / "02_png_metadata" / folder)[0]) == 1


@reported
@pytest.mark.parametrize("name, count", [("latin1_title.avi", 5), ("shiftjis_title.avi", 5),
                                         ("real_fate_svq3_watermark.mov", 10)])
def test_03_tags_in_any_encoding_are_left_out(name, count):
    assert len(seconds(f"03_metadata_not_utf8/{name}")) == count


@reported
@pytest.mark.parametrize("name", ["paff.ts", "paff.mkv", "paff.mp4"])
def test_04_two_fields_are_one_frame(name):
    assert seconds(f"04_paff/{name}") == pytest.approx([0, 0.04, 0.08, 0.12, 0.16], abs=0.002)


@reported
@pytest.mark.parametrize("name", ["naive_hevc.mp4", "naive_h264.mov", "naive_h264.mkv", "real_fate_vc1-wmapro.ismv"])
def test_05_packets_with_times_of_decoding_alone_give_every_frame_at_rising_times(name):
    path = CASES / "05_pts_equals_dts" / name
    with av.open(str(path)) as file:
        wanted = sum(1 for _ in file.decode(video=0))
    times = seconds(f"05_pts_equals_dts/{name}")
    assert len(times) == wanted and times == sorted(set(times))


@reported
@pytest.mark.parametrize("name", ["nvop.mp4", "nvop.3gp", "nvop.mkv", "nvop.avi"])
def test_07_pictures_that_are_not_coded_repeat_the_one_before(name):
    assert seconds(f"07_mpeg4_not_coded/{name}") == pytest.approx([0, 0.1, 0.4], abs=0.002)


@reported
@pytest.mark.parametrize("name", ["empty_mjpeg.mov", "empty_h264.mp4"])
def test_08_a_sample_of_no_bytes_leaves_the_frame_before(name):
    assert seconds(f"08_empty_sample/{name}") == pytest.approx([0, 0.1, 0.3, 0.4], abs=0.002)


@reported
@pytest.mark.parametrize("name", ["vp9_alpha.webm", "vp8_alpha.webm", "prores4444_alpha.mov"])
def test_09_what_is_transparent_is_black(name):
    frames = read(CASES / "09_webm_alpha" / name)[0]
    assert frames[:, :, :40].mean() < 4 < 60 < frames[:, :, 56:].mean()


@reported
def test_10_an_animated_avif_moves():
    assert seconds("10_animated_avif/anim.avif") == [0, 0.1, 0.2, 0.3, 0.4]


@reported
@pytest.mark.parametrize("name", ["exif_2", "exif_4", "exif_5", "exif_7", "real_exif_samples_landscape_2"])
def test_12_a_mirrored_picture_is_shown_as_pillow_shows_it(name):
    frames = read(CASES / "12_mirrored" / name)[0]
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(CASES / "12_mirrored" / name / "0.jpg")).convert("RGB"))
    assert frames[0].shape == wanted.shape and np.abs(frames[0] - wanted).mean() < 2


@reported
@pytest.mark.parametrize("name, change", [("hflip.mp4", np.fliplr), ("vflip.mp4", np.flipud),
                                          ("transpose.mp4", lambda x: x.transpose(1, 0, 2))])
def test_12_a_mirrored_video_is_shown_as_its_matrix_says(name, change):
    path = CASES / "12_mirrored" / name
    with av.open(str(path)) as file:
        stored = next(file.decode(video=0)).to_ndarray(format="rgb24").astype(float)
    shown = read(path)[0][0]
    ways = {way: np.abs(shown - turned).mean() for way, turned in (("right", change(stored)), ("stored", stored))
            if turned.shape == shown.shape}
    assert min(ways, key=ways.get) == "right" and ways["right"] < 8, ways


@reported
@pytest.mark.parametrize("name", ["thumbnail_first.mov", "two_videos.mkv"])
def test_14_of_two_videos_the_default_is_read_and_said(name):
    frames, _, video = read(CASES / "14_two_videos" / name)
    assert frames.shape == (5, 64, 96, 3) and "holds 2 videos" in video.notes[0]


@reported
def test_15_a_recording_starts_at_zero():
    assert seconds("15_starts_at_10_hours/starts_at_10h.mkv")[0] < 0.1


@reported
@pytest.mark.parametrize("name, tone", [("17_mp3_low_rate/mp3_8k.avi", None), ("17_mp3_low_rate/mp3_11k.mkv", None),
                                        ("18_truehd_in_mkv/truehd.mkv", 48000)])
def test_17_and_18_sound_that_mp4_does_not_take_so_becomes_aac(tmp_path, name, tone):
    copy(CASES / name, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert file.streams.audio[0].name == "aac"
        wave = np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=1)
    assert np.sqrt(np.square(wave).mean()) > 0.01
    if tone:  # an AAC frame of priming at most
        spectrum = np.abs(np.fft.rfft(wave[0])) ** 2
        peak = spectrum.argmax()
        assert 0 <= wave.shape[1] - tone <= 3 * 1024 and spectrum[peak - 20 : peak + 21].sum() > 0.9 * spectrum.sum()


@reported
def test_20_a_recorder_without_a_rate_has_the_one_of_its_frames():
    with Video(CASES / "20_recorder_1000_fps" / "real_firefox53_start.webm", skip_broken=True) as video:
        assert 5 <= video.format.rate <= 60, video.format.rate


# ---- whole commands --------------------------------------------------------------------------------------------------

def shell(line: str, *arguments):
    """A line of bash, with $PY for this Python and $1, $2 ... for the arguments -> the finished process."""
    command = ["bash", "-c", line.replace("$PY", f"'{sys.executable}'"), "bash", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")


@reported
def test_21_and_22_a_video_that_is_written_is_status_0_whatever_becomes_of_its_last_line(tmp_path):
    """No stderr, a console that lacks the name's letters, and no room for them; test_desk has each alone."""
    line = "PYTHONIOENCODING=cp1252 $PY infer.py $1 $2 2>&- > /dev/full"
    source, target = CASES / "22_stdout_refuses_the_last_line" / "plain.mp4", tmp_path / "\u65e5\u672c\u8a9e.mp4"
    done = shell(line, source, target)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(read(target)[0]) == len(read(source)[0])


@reported
@pytest.mark.parametrize("name", ["\u9577" * 83 + ".mp4", "f" * 250])
def test_23_names_as_long_as_the_file_system_takes_are_written(tmp_path, name):
    copy(CASES / "23_long_names" / "plain.mp4", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@reported
def test_24_scores_are_written_whatever_becomes_of_the_table(tmp_path):
    ascii_files = "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"  # as Windows' files are cp1252, if nothing is said
    line = f"set -o pipefail; {ascii_files} PYTHONIOENCODING=cp1252 $PY evaluate.py --pred $1 --gt $2 --out $3 | true"
    case = CASES / "24_scores_lost_in_cp1252"
    done = shell(line, case / "pred", case / "gt", tmp_path / "scores")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert "PSNR \u2191" in (tmp_path / "scores" / "scores.md").read_text(encoding="utf-8")


@pytest.fixture
def scored(tmp_path):
    """The folders of case 24, to be changed, and evaluate.py's output on them."""
    for name in ("pred", "gt"):
        shutil.copytree(CASES / "24_scores_lost_in_cp1252" / name, tmp_path / name)

    def score(*more):
        done = scripts.run("evaluate.py", "--pred", tmp_path / "pred", "--gt", tmp_path / "gt", *more)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return tmp_path, score


@reported
def test_25_hidden_entries_are_passed_over(scored):
    folder, score = scored
    for name in ("gt/.ipynb_checkpoints", "pred/.ipynb_checkpoints", "gt/@eaDir"):
        (folder / name).mkdir()
    (folder / "gt" / "._a.mp4").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    assert "scored: 1 videos" in score()


@reported
def test_27_every_container_is_a_video(scored):
    folder, score = scored
    for name in ("pred", "gt"):
        shutil.copy(CASES / "27_evaluate_passes_over_containers" / "b.ts", folder / name)
    assert "scored: 2 videos" in score()


@reported
def test_28_a_byte_order_mark_is_no_mistake(tmp_path):
    frames = [{"file_path": "0.png", "transform_matrix": np.eye(4).tolist()}]
    files = {"boxes.json": {"a": [[1, 1, 40, 40]]}, "transforms.json": {"fl_x": 50, "frames": frames}}
    for name, content in files.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    assert read_boxes(tmp_path / "boxes.json", "a", 1).tolist() == [[1, 1, 40, 40]]
    assert len(read_cameras(tmp_path / "transforms.json", 40, 30)) == 1


HEADERS = {"crlf": (b"\n", b"\r\n"), "obj_info": (b"element vertex", b"obj_info by CloudCompare!\nelement vertex"),
           "comment after element": (b"element vertex 5\n", b"element vertex 5\ncomment x\n"),
           "comment before the end": (b"end_header", b"comment x\nend_header"),
           "comment before format": (b"ply\n", b"ply\ncomment x\n"),
           "an empty element first": (b"element vertex", b"element camera 0\nproperty float view_px\nelement vertex")}


@pytest.mark.parametrize("kind", HEADERS)
def test_29_every_valid_header_of_a_ply_is_read(tmp_path, kind):
    torch.manual_seed(0)
    save_ply(tmp_path / "a.ply", Gaussians(*(torch.randn(5, *n) for n in ((3,), (3,), (4,), (), (1, 3)))))
    data, wanted = (tmp_path / "a.ply").read_bytes(), load_ply(tmp_path / "a.ply")
    at = data.index(b"end_header\n") + 11
    (tmp_path / "a.ply").write_bytes(data[:at].replace(*HEADERS[kind]) + data[at:])
    assert torch.equal(load_ply(tmp_path / "a.ply").means, wanted.means)


def one_camera(folder, **fields):
    """The camera of a transforms.json with these fields."""
    frames = [{"file_path": "images/0001.png", "transform_matrix": np.eye(4).tolist()}]
    (folder / "transforms.json").write_text(json.dumps({"fl_x": 50, "frames": frames} | fields))
    return read_cameras(folder / "transforms.json", 40, 30)[0]


@pytest.mark.parametrize("fields, named", [
    ({"camera_model": "EQUIRECTANGULAR"}, "camera_model"), ({"is_fisheye": True}, "is_fisheye"),
    ({"camera_model": "OPENCV_FISHEYE", "k1": 0, "k2": 0, "k3": 0, "k4": 0}, "camera_model"),
    ({"camera_model": "ORTHOPHOTO"}, "camera_model"), ({"k5": 0.2}, "k5"), ({"k6": 0.1}, "k6"), ({"k1": -0.3}, "k1"),
    ({"distortion_params": [-0.3, 0.1, 0, 0, 0, 0]}, "distortion_params")])
def test_31_and_32_what_is_no_pinhole_is_refused_by_name(tmp_path, fields, named):
    with pytest.raises(ValueError, match=rf"frames\[0\].{named}: wanted"):
        one_camera(tmp_path, **fields)


@reported
def test_31_a_real_panorama_is_refused_by_name():
    real = CASES / "31_camera_model_ignored" / "real_LichtFeld_Export01_transforms_3_frames.json"
    with pytest.raises(ValueError, match=r"frames\[0\].camera_model: wanted one of .*, got 'EQUIRECTANGULAR'"):
        read_cameras(real, 5888, 2944)


@reported
@pytest.mark.parametrize("name", ["%04d.png", "*.png"])
def test_37_a_pattern_is_no_name(name):
    with pytest.raises(ValueError, match=re.escape(f"frames/{name}: ")):
        Video(CASES / "37_frame_pattern" / "frames" / name)


# ---- what passed, and must ------------------------------------------------------------------------------------------

PIXELS = [  # file, codec, pixel format, largest difference of 255
    ("10 bits.mkv", "libx265", "yuv420p10le", 4), ("4:4:4.mkv", "libx264", "yuv444p", 4),
    ("RGB.mkv", "libx264rgb", "rgb24", 3), ("grey.mkv", "ffv1", "gray", None),
    ("grey 10.mkv", "ffv1", "gray10le", None),
    ("ProRes.mov", "prores_ks", "yuv422p10le", 4), ("ProRes 4444.mov", "prores_ks", "yuva444p10le", 4),
    ("VP9 10 bits.webm", "libvpx-vp9", "yuv420p10le", 8),
    ("FLV.flv", "flv1", "yuv420p", 12), ("WMV.wmv", "wmv2", "yuv420p", 12), ("MPEG-2.mpg", "mpeg2video", "yuv420p", 9),
    ("MJPEG.avi", "mjpeg", "yuvj422p", 8), ("huffyuv.avi", "huffyuv", "rgb24", 0),
    ("utvideo.avi", "utvideo", "gbrp", 0),
    ("zmbv.avi", "zmbv", "bgr0", 0), ("rle.mov", "qtrle", "rgb24", 0), ("v210.mov", "v210", "yuv422p10le", 3),
    ("UYVY.avi", "rawvideo", "uyvy422", 3), ("nv12.mkv", "rawvideo", "nv12", 4), ("16 bits.mkv", "ffv1", "gbrp16le", 1),
    ("FFV1 10 bits.mkv", "ffv1", "yuv444p10le", 2), ("AV1.mkv", "libsvtav1", "yuv420p", 12)]


@pytest.mark.parametrize("name, codec, pix_fmt, tolerance", PIXELS, ids=[name for name, *_ in PIXELS])
def test_50_pixels_of_every_kind_are_read(tmp_path, name, codec, pix_fmt, tolerance):
    try:
        source = encode(tmp_path / name, pictures(3), codec, pix_fmt)
    except (ValueError, av.FFmpegError) as error:
        pytest.skip(f"this libav does not write it: {error}")
    frames = read(source)[0]
    if pix_fmt.startswith("gray"):
        luma = np.stack(pictures(3)) @ [0.299, 0.587, 0.114]
        assert np.abs(frames - luma[..., None]).max() < 4
    else:
        assert_close(frames, pictures(3), tolerance)


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.mp4", "a.gif", "a.png", "a.ts"])
def test_51_one_frame_is_a_video(tmp_path, name):
    codec = {"a.webm": "libvpx-vp9", "a.mkv": "libx264"}.get(name, "libx264")
    if name in ("a.gif", "a.png"):
        Image.fromarray(picture(0)).save(tmp_path / name)
    else:
        encode(tmp_path / name, pictures(1), codec)
    frames, times, _ = read(tmp_path / name)
    assert len(frames) == 1 and times[0][0] == 0


@pytest.mark.parametrize("name, codec, tick", [
    ("a.mkv", "libx264", Fraction(1, 1000)), ("a.webm", "libvpx", Fraction(1, 1000)),
    ("a.mp4", "libx264", Fraction(1, 10**9))])
def test_51_irregular_times_are_kept(tmp_path, name, codec, tick):
    wanted = [Fraction(t, 1000) for t in (0, 40, 43, 143, 500)]
    source = encode(tmp_path / name, pictures(5), codec, pts=[int(t / tick) for t in wanted], time_base=tick)
    copy(source, tmp_path / "out.mp4")
    for path in (source, tmp_path / "out.mp4"):
        assert [float(t) for t, _ in read(path)[1]] == pytest.approx([float(t) for t in wanted], abs=1e-4)


def test_51_two_frames_at_one_time_are_two(tmp_path):
    source = encode(tmp_path / "in.mkv", pictures(5), options={"bf": "0"})
    remux(source, tmp_path / "twice.mkv", lambda number, content, pts, dts: (content, *[pts - 100 * (number == 2)] * 2))
    frames, times, _ = read(tmp_path / "twice.mkv")
    assert_close(frames, pictures(5), 8)
    assert [t for t, _ in times] == sorted({t for t, _ in times})


SOUNDS = [("a.mkv", "ac3", "5.1"), ("a.mkv", "eac3", "stereo"), ("a.mov", "alac", "stereo"), ("a.ts", "aac", "stereo"),
          ("a.mkv", "pcm_s24le", "stereo"), ("a.mov", "pcm_mulaw", "mono"), ("a.avi", "pcm_u8", "mono"),
          ("a.mkv", "vorbis", "stereo"), ("a.ts", "libopus", "stereo"), ("a.mkv", "flac", "6.1"),
          ("a.mkv", "pcm_s16le", "hexadecagonal")]  # of sixteen


@pytest.mark.parametrize("name, codec, layout", SOUNDS, ids=[codec for _, codec, _ in SOUNDS])
def test_52_sound_of_every_kind_is_as_loud_and_as_long(tmp_path, name, codec, layout):
    wave = (np.sin(np.arange(48000) * (2 * np.pi * 440 / 48000)) / 32).astype(np.float32)
    pixels = encode(tmp_path / f"silent{Path(name).suffix}", pictures(10), "mpeg4")
    with av.open(str(pixels)) as given, av.open(str(tmp_path / name), "w") as out:
        video = out.add_stream_from_template(given.streams.video[0])
        track = out.add_stream(codec, rate=48000, layout=layout, options={"strict": "-2"})
        resampler = av.AudioResampler(track.codec_context.format, track.layout, 48000)
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = video
                out.mux(packet)
        frame = av.AudioFrame.from_ndarray(wave.repeat(track.layout.nb_channels)[None], "flt", track.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            out.mux(track.encode(part))
    copy(tmp_path / name, tmp_path / "out.mp4")
    loudness = []
    for path in (tmp_path / name, tmp_path / "out.mp4"):
        with av.open(str(path)) as file:
            stereo = av.AudioResampler("fltp", "stereo", 48000)
            heard = [part.to_ndarray() for frame in file.decode(audio=0) for part in stereo.resample(frame)]
        heard = np.concatenate(heard, axis=1)[0]
        assert 0.9 < len(heard) / 48000 < 1.2, "seconds"
        loudness.append(heard[9600:38400].std())
    assert loudness[1] == pytest.approx(loudness[0], rel=0.15), loudness


@pytest.mark.parametrize("folder, file", [("a [1] {2}", "0 # '.png"), ("pct%d", "%d.png"), ("what? *", "*.png")])
def test_53_a_name_is_a_name(tmp_path, folder, file):
    (tmp_path / folder).mkdir()
    Image.fromarray(picture(1)).save(tmp_path / folder / file)
    Image.fromarray(picture(2)).save(tmp_path / folder / "1.png")
    for hidden in ("Thumbs.db", ".DS_Store", "._1.png"):
        (tmp_path / folder / hidden).write_bytes(b"x")
    assert len(read(tmp_path / folder)[0]) == 2


@pytest.mark.parametrize("mode, options, name", [
    ("CMYK", {}, "0.jpg"), ("CMYK", {}, "0.tif"), ("P", {}, "0.png"), ("LA", {}, "0.png"), ("L", {}, "0.png"),
    ("RGB", {"progressive": True}, "0.jpg"), ("RGB", {"icc_profile": b"x" * 200}, "0.png"), ("RGB", {}, "0.webp")])
def test_53_pictures_of_every_kind_are_as_pillow_shows_them(tmp_path, mode, options, name):
    image = Image.fromarray(picture(3)).convert(mode)
    image.save(tmp_path / name, **options)
    wanted = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(float)
    assert np.abs(read(tmp_path)[0][0] - wanted).max() <= 1


@pytest.mark.parametrize("source, said", [("https://a.b/c.mp4", "No such file"), ("C:\\x.mp4", "No such file"),
                                          ("-", "No such file"), ("/dev/null", "is no file")])
def test_54_what_is_no_file_is_said_to_be_none(tmp_path, monkeypatch, source, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        Video(source)


@pytest.mark.parametrize("name", ["a\\b.mp4", "a\udcffb.mp4", "a:b.mp4"])
def test_54_bytes_of_any_kind_may_be_in_a_name(tmp_path, name):
    write_clip(tmp_path / name, torch.zeros(3, 2, 16, 16))
    assert len(read(tmp_path / name)[0]) == 2


def test_55_what_exporters_write_into_transforms_json_is_read_or_refused_by_name(tmp_path):
    more = {"w": 40.0, "h": 30.0, "aabb_scale": 16, "applied_transform": np.eye(4)[:3].tolist(), "ply_file_path": "x"}
    frames = [{"file_path": f"./images/{name}", "transform_matrix": np.eye(4).tolist(), "fl_x": 50 + i,
               "colmap_im_id": i} for i, name in enumerate(("r_10", "r_2"))]
    (tmp_path / "transforms.json").write_text(json.dumps(more | {"frames": frames}))
    images = [tmp_path / "images" / name for name in ("r_2.png", "r_10.png")]
    assert [camera.K[0, 0] for camera in read_cameras(tmp_path / "transforms.json", 40, 30, images)] == [51, 50]
    for fields, named in (({"w": 20, "h": 15}, "w, h"), ({"fl_x": "50"}, "fl_x")):
        with pytest.raises(ValueError, match=named):
            one_camera(tmp_path, **fields)


@pytest.mark.parametrize("header", [b"format binary_big_endian 1.0\nelement vertex 1\nproperty float x\n",
                                    b"format binary_little_endian 1.0\nelement chunk 1\nproperty float min_x\n"
                                    b"element vertex 1\nproperty uint packed_position\n"])
def test_56_a_compressed_or_big_endian_ply_is_refused_and_says_so(tmp_path, header):
    (tmp_path / "a.ply").write_bytes(b"ply\n" + header + b"end_header\n" + bytes(64))
    with pytest.raises(ValueError, match="a.ply: .*(compressed|binary_little_endian|one property x)"):
        load_ply(tmp_path / "a.ply")


@pytest.mark.parametrize("keys", [
    ("base_model.model.blocks.0.attn1.to_q.lora_A.weight", "base_model.model.blocks.0.attn1.to_q.lora_B.weight"),
    ("lora_unet_blocks_0_attn1_to_q.lora_down.weight", "lora_unet_blocks_0_attn1_to_q.alpha"),
    ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.self_attn.q.alpha")])
def test_57_a_lora_of_another_programs_names_is_refused_and_they_are_named(keys):
    """Their scale is in another file, or in tensors: to guess it would be silently wrong."""
    tensors = {key: torch.zeros(()) if key.endswith("alpha") else torch.zeros(2, 8) for key in keys}
    with pytest.raises(ValueError, match=r"other.safetensors: .*unexpected: .*(base_model|lora_unet|diffusion_model)"):
        small.mirage().load_stage(tensors, {}, "other.safetensors")
