"""What users of peer software reported, with the files that they or we made of it: ../shared/cases, by number.

Each kind has its own test on made inputs as well, where it is read (test_decode, test_pictures, test_sound, test_scene,
test_evaluate, test_desk, test_place). Here the reported files themselves have their right values; without them these
tests skip.
"""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from mirage_min.data.video import Video
from tests.media import copy, read

CASES = Path(__file__).parents[2] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason=f"needs {CASES}")


def seconds(name: str) -> list[float]:
    """The times of a case's frames."""
    return [round(float(time), 3) for time, _ in read(CASES / name)[1]]


@pytest.mark.parametrize("folder", ["ffmpeg", "imageio", "pillow_with_dpi", "real_exif_samples_Arbitro",
                                    "real_libheif_rgb"])
def test_01_tiffs_of_a_folder_are_their_pixels(folder):
    frames, _, _ = read(CASES / "01_tiff_folder" / folder)
    file = next((CASES / "01_tiff_folder" / folder).iterdir())
    assert np.abs(frames - np.asarray(Image.open(file).convert("RGB"))[None]).max() == 0


@pytest.mark.parametrize("folder", ["exif_junk", "exif_prefix", "iccp_junk"])
def test_02_pngs_with_odd_metadata_are_read(folder):
    assert len(read(CASES / "02_png_metadata" / folder)[0]) == 1


@pytest.mark.parametrize("name, count", [("latin1_title.avi", 5), ("shiftjis_title.avi", 5),
                                         ("real_fate_svq3_watermark.mov", 10)])
def test_03_tags_in_any_encoding_are_left_out(name, count):
    assert len(seconds(f"03_metadata_not_utf8/{name}")) == count


@pytest.mark.parametrize("name", ["paff.ts", "paff.mkv", "paff.mp4"])
def test_04_two_fields_are_one_frame(name):
    assert seconds(f"04_paff/{name}") == pytest.approx([0, 0.04, 0.08, 0.12, 0.16], abs=0.002)


@pytest.mark.parametrize("name", ["naive_hevc.mp4", "naive_h264.mov", "naive_h264.mkv", "real_fate_vc1-wmapro.ismv"])
def test_05_packets_with_times_of_decoding_alone_give_every_frame_at_rising_times(name):
    path = CASES / "05_pts_equals_dts" / name
    with av.open(str(path)) as file:
        wanted = sum(1 for _ in file.decode(video=0))
    times = seconds(f"05_pts_equals_dts/{name}")
    assert len(times) == wanted and times == sorted(set(times))


@pytest.mark.parametrize("name", ["nvop.mp4", "nvop.3gp", "nvop.mkv", "nvop.avi"])
def test_07_pictures_that_are_not_coded_repeat_the_one_before(name):
    assert seconds(f"07_mpeg4_not_coded/{name}") == pytest.approx([0, 0.1, 0.4], abs=0.002)


@pytest.mark.parametrize("name", ["empty_mjpeg.mov", "empty_h264.mp4"])
def test_08_a_sample_of_no_bytes_leaves_the_frame_before(name):
    assert seconds(f"08_empty_sample/{name}") == pytest.approx([0, 0.1, 0.3, 0.4], abs=0.002)


@pytest.mark.parametrize("name", ["vp9_alpha.webm", "vp8_alpha.webm", "prores4444_alpha.mov"])
def test_09_what_is_transparent_is_black(name):
    frames = read(CASES / "09_webm_alpha" / name)[0]
    assert frames[:, :, :40].mean() < 4 < 60 < frames[:, :, 56:].mean()


def test_10_an_animated_avif_moves():
    assert seconds("10_animated_avif/anim.avif") == [0, 0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize("name", ["exif_2", "exif_4", "exif_5", "exif_7", "real_exif_samples_landscape_2"])
def test_12_a_mirrored_picture_is_shown_as_pillow_shows_it(name):
    frames = read(CASES / "12_mirrored" / name)[0]
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(CASES / "12_mirrored" / name / "0.jpg")).convert("RGB"))
    assert frames[0].shape == wanted.shape and np.abs(frames[0] - wanted).mean() < 2


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


@pytest.mark.parametrize("name", ["thumbnail_first.mov", "two_videos.mkv"])
def test_14_of_two_videos_the_default_is_read_and_said(name):
    frames, _, video = read(CASES / "14_two_videos" / name)
    assert frames.shape == (5, 64, 96, 3) and "holds 2 videos" in video.notes[0]


def test_15_a_recording_starts_at_zero():
    assert seconds("15_starts_at_10_hours/starts_at_10h.mkv")[0] < 0.1


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


def test_20_a_recorder_without_a_rate_has_the_one_of_its_frames():
    with Video(CASES / "20_recorder_1000_fps" / "real_firefox53_start.webm", skip_broken=True) as video:
        assert 5 <= video.format.rate <= 60, video.format.rate
