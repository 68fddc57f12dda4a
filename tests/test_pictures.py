"""Pictures: as Pillow shows them, in order, each at its time, and none that is half."""

import io
import re
import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageOps

from mirage_min.data.pictures import FORMATS, rate_of
from mirage_min.data.video import Video
from tests.media import HEIGHT, WIDTH, assert_close, picture, pictures, read

NOISE = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)


def png_with(kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk after its header, its checksum right."""
    file = io.BytesIO()
    Image.fromarray(picture(3)).save(file, "PNG")
    data, chunk = file.getvalue(), kind + content
    return data[:33] + len(content).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[33:]


# ---- one picture a frame ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"dpi": (300, 300)}, {"compression": "tiff_lzw"}, {"compression": "jpeg"},
                                      {"compression": "tiff_adobe_deflate", "dpi": (72, 72)}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_tiffs_of_every_kind_are_read_from_a_folder_and_by_name(tmp_path, mode, settings):
    if mode in ("RGBA", "P", "CMYK") and settings.get("compression") == "jpeg":
        pytest.skip("no such TIFF")
    image = Image.fromarray(picture(3)).convert(mode)
    image.save(tmp_path / "0.tif", **settings)
    wanted = np.asarray(Image.open(tmp_path / "0.tif").convert("RGB"))
    assert_close(read(tmp_path)[0], [wanted], 1)
    assert_close(read(tmp_path / "0.tif")[0], [wanted], 1)


@pytest.mark.parametrize("kind, content", [(b"eXIf", b"Exif\0\0" + b"MM\0*" + bytes(4)), (b"eXIf", b"junkjunkjunk"),
                                           (b"iCCP", b"junk"), (b"tEXt", b"\xff\xfe\0\xff" * 9),
                                           (b"iCCP", b"name\0\0junk"), (b"zTXt", b"x\0\0junk"),
                                           (b"gAMA", bytes(4)), (b"prVt", b"whatever")])
def test_a_png_with_odd_metadata_is_its_pixels(tmp_path, kind, content):
    (tmp_path / "0.png").write_bytes(png_with(kind, content))
    assert_close(read(tmp_path)[0], [picture(3)], 0)


@pytest.mark.parametrize("orientation", range(0, 10))
@pytest.mark.parametrize("name", ["0.jpg", "0.png", "0.webp", "0.tif"])
def test_every_orientation_of_exif_is_shown_as_pillow_shows_it(tmp_path, name, orientation):
    image = picture(3)
    image[: HEIGHT // 2, : WIDTH // 4] = (250, 20, 20)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(tmp_path / name, exif=exif, **({"lossless": True} if name == "0.webp" else {}))
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / name)).convert("RGB"))
    assert (wanted.shape == image.shape) == (orientation not in (5, 6, 7, 8))
    frames, _, video = read(tmp_path)
    assert_close(frames, [wanted], 0)
    assert (video.format.height, video.format.width) == wanted.shape[:2]


@pytest.mark.parametrize("name, mode", [("a.png", "I;16"), ("a.tif", "I;16"), ("a.tif", "F"), ("a.ppm", "I")])
def test_more_than_eight_bits_are_scaled_and_not_clipped(tmp_path, name, mode):
    ramp = np.linspace(0, 1, WIDTH)[None].repeat(HEIGHT, 0)
    stored = ramp.astype(np.float32) if mode == "F" else (ramp * 65535).round().astype(np.uint16)
    if mode == "I":
        (tmp_path / name).write_bytes(b"P5\n96 64\n65535\n" + stored.astype(">u2").tobytes())
    else:
        Image.fromarray(stored).save(tmp_path / name)
    assert_close(read(tmp_path)[0], [np.stack([ramp * 255] * 3, axis=-1)], 1)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".avif"])
@pytest.mark.parametrize("kind", [kind for kind in ("JPEG", "PNG", "WEBP", "AVIF") if kind in FORMATS])
def test_a_picture_is_what_it_holds_and_not_what_it_is_called(tmp_path, suffix, kind):
    Image.fromarray(picture(3)).save(tmp_path / f"0{suffix}", kind, quality=100)
    assert_close(read(tmp_path)[0], [picture(3)], 6)


def test_a_jpeg_without_its_last_two_bytes_is_whole_and_with_half_of_them_none(tmp_path):
    file = io.BytesIO()
    Image.fromarray(picture(3)).save(file, "JPEG", quality=95)
    assert file.getvalue()[-2:] == b"\xff\xd9"
    (tmp_path / "0.jpg").write_bytes(file.getvalue()[:-2])
    assert_close(read(tmp_path)[0], [picture(3)], 8)
    Image.fromarray(NOISE).save(file := io.BytesIO(), "JPEG", quality=95)
    for share in (0.25, 0.5, 0.75, 0.95):
        (tmp_path / "0.jpg").write_bytes(file.getvalue()[: int(share * len(file.getvalue()))])
        with pytest.raises(ValueError, match="0.jpg.* does not decode"):
            read(tmp_path)


def test_bytes_after_the_end_of_a_picture_do_not_matter(tmp_path):
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"):
        file = io.BytesIO()
        Image.fromarray(picture(3)).save(file, kind, **({"quality": 100} if kind in ("JPEG", "WEBP") else {}))
        (tmp_path / "0.png").write_bytes(file.getvalue() + b"appended by somebody" * 99)
        assert_close(read(tmp_path)[0], [picture(3)], 6)


# ---- pictures that move ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_an_animation_keeps_its_frames_and_their_times(tmp_path, kind):
    images = [Image.fromarray(np.full((34, 46, 3), level, np.uint8)) for level in (10, 80, 160, 240)]
    path = tmp_path / f"a.{kind.lower()}"
    images[0].save(path, kind, save_all=True, append_images=images[1:], duration=[50, 120, 70, 400])
    frames, times, video = read(path)
    assert_close(frames, [np.asarray(image) for image in images], 2)
    assert times == [(Fraction(a, 1000), Fraction(b, 1000)) for a, b in ((0, 50), (50, 120), (170, 70), (240, 400))]
    assert video.count == 4 and video.format.rate == 20


def test_what_a_gif_leaves_open_is_black_and_frames_too_short_last_a_tenth_of_a_second(tmp_path):
    base = Image.new("RGBA", (40, 32), (0, 0, 0, 0))
    images = []
    for t in range(3):
        image = base.copy()
        image.paste((200, 100, 50, 255), (10 * t, 0, 10 * t + 10, 32))
        images.append(image)
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=10, disposal=2)
    frames, times, _ = read(tmp_path / "a.gif")
    wanted = [np.asarray(Image.alpha_composite(Image.new("RGBA", base.size, "black"), image).convert("RGB"))
              for image in images]
    assert_close(frames, wanted, 2)
    assert [t for t, _ in times] == [0, Fraction(1, 10), Fraction(1, 5)]


def test_a_png_that_shows_another_picture_to_whoever_cannot_animate_starts_after_it(tmp_path):
    images = [Image.fromarray(p) for p in pictures(4)]
    images[0].save(tmp_path / "a.png", save_all=True, default_image=True, append_images=images[1:], duration=100)
    frames, times, _ = read(tmp_path / "a.png")
    assert_close(frames, pictures(4)[1:], 0)
    assert [t for t, _ in times] == [0, Fraction(1, 10), Fraction(1, 5)]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "AVIF", "TIFF", "BMP"])
def test_a_picture_that_does_not_move_is_one_frame_of_the_rate_asked_for(tmp_path, kind):
    Image.fromarray(picture(3)).save(tmp_path / f"a.{kind.lower()}")
    frames, times, video = read(tmp_path / f"a.{kind.lower()}", fps=10)
    assert frames.shape == (1, HEIGHT, WIDTH, 3) and times == [(0, Fraction(1, 10))] and video.format.rate == 10


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_an_animation_that_was_cut_off_is_refused_or_filled_up(tmp_path, kind):
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 255, (40, 56, 3), np.uint8)) for _ in range(6)]
    path = tmp_path / f"a.{kind.lower()}"
    images[0].save(path, kind, save_all=True, append_images=images[1:], duration=100)
    data = path.read_bytes()
    for left in (len(data) // 2, len(data) * 4 // 5, len(data) - (200 if kind == "PNG" else 1)):  # IEND holds nothing
        path.write_bytes(data[:left])
        with pytest.raises(ValueError, match="does not decode|cannot be read|holds no frames") as error:
            read(path)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    if kind == "GIF":
        frames, _, video = read(path, skip_broken=True)
        assert len(frames) == 7 and video.broken == [6] and (frames[6] == frames[5]).all()


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow has no AVIF")
def test_an_avif_whose_tables_disagree_about_its_frames_is_refused(tmp_path):
    images = [Image.fromarray(picture(20 * t)) for t in range(6)]
    path = tmp_path / "a.avif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    assert len(read(path)[0]) == 6
    data = bytearray(path.read_bytes())
    samples = data.index(b"stsc") + 16  # after version, flags, number of entries, first chunk: samples of a chunk
    assert int.from_bytes(data[samples : samples + 4], "big") == 6
    data[samples : samples + 4] = (2).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(ValueError, match="frame 2 .* does not decode"):
        read(path)


def test_an_animated_webp_with_a_spoilt_chunk_is_refused_and_not_read_by_libav_without_its_frame(tmp_path):
    images = [Image.fromarray(picture(20 * t)) for t in range(6)]
    path = tmp_path / "a.webp"
    images[0].save(path, save_all=True, append_images=images[1:], duration=100)
    data = bytearray(path.read_bytes())
    third = [found.start() for found in re.finditer(b"ANMF", data)][2]
    data[third : third + 8] = b"XXXX" + (16).to_bytes(4, "little")  # its frame's data now lie outside of it
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a.webp: .*(cannot be read as a picture|does not decode)"):
        read(path)


def test_of_a_tiff_of_several_pages_the_first_is_read_and_named(tmp_path):
    first, *others = (Image.fromarray(picture(20 * t)) for t in range(3))
    first.save(tmp_path / "a.tif", save_all=True, append_images=others)
    frames, _, video = read(tmp_path / "a.tif")
    assert (frames == np.asarray(first)).all() and len(frames) == 1
    assert video.notes == [f"{tmp_path / 'a.tif'}: holds 3 pictures; read is the first"]
    first.save(tmp_path / "one.tif")
    assert read(tmp_path / "one.tif")[2].notes == [], "of a single picture there is nothing to say"


@pytest.mark.parametrize("skip_broken", [False, True])
def test_a_picture_that_may_not_be_read_is_said_to_be_that_and_not_skipped(tmp_path, monkeypatch, skip_broken):
    Image.fromarray(picture(0)).save(tmp_path / "0.png")

    def refuse(*args, **settings):
        raise PermissionError(13, "Permission denied", str(args[0]))
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ValueError, match="0.png: Permission denied$"):
        read(tmp_path, skip_broken=skip_broken)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "BMP"])
def test_a_header_that_claims_a_picture_too_large_for_memory_is_refused(tmp_path, kind):
    file, side = io.BytesIO(), 100_000
    Image.new("L", (20, 30)).save(file, kind)
    data = bytearray(file.getvalue())
    if kind == "GIF":
        data[6:10] = 2 * (65535).to_bytes(2, "little")
    elif kind == "PNG":
        data[16:24] = 2 * side.to_bytes(4, "big")
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    elif kind == "BMP":
        data[18:26] = 2 * side.to_bytes(4, "little")
    else:
        for tag in (b"\x00\x01\x04\x00\x01\x00\x00\x00", b"\x01\x01\x04\x00\x01\x00\x00\x00"):
            assert data.count(tag) == 1
            data[data.index(tag) + 8 : data.index(tag) + 12] = side.to_bytes(4, "little")
    (tmp_path / f"0.{kind.lower()}").write_bytes(data)
    for path in (tmp_path / f"0.{kind.lower()}", *([tmp_path] if kind != "GIF" else [])):
        with pytest.raises(ValueError, match="cannot be read|does not decode|holds no frames"):
            Video(path)


@pytest.mark.parametrize("milliseconds", [1, 1000, 10**7])
def test_a_rate_is_never_nothing(milliseconds):
    assert 0 < rate_of(milliseconds) <= 1000
